"""Measure tokenizers and priors."""
