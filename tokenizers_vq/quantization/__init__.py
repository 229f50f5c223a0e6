"""Quantizers: vector quantization (VQ), residual VQ and finite scalar quantization (FSQ)."""
