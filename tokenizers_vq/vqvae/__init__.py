"""VQ-VAE tokenizers for images and for text."""
