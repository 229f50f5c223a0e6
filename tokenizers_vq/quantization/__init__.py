"""Vector quantization: codebooks, residual quantization, FSQ."""
