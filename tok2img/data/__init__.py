"""Read captioned images."""
