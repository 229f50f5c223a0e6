"""Turn captioned images into token sequences."""
