"""The prior: a causal language model over text and image tokens."""
