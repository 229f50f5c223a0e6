"""Benchmarks of time and memory against plain implementations and other projects; `python -m benchmarks` lists them."""
