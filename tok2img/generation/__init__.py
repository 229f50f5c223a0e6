"""Generate image codes or captions with a prior."""
