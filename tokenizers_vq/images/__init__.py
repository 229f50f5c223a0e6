"""Load images and convert them to and from tensors."""
