"""VQ-DRAW for images and text."""
