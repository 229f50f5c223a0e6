"""VQ-VAE for images and text."""
