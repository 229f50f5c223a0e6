"""Make sheets of images and charts."""
