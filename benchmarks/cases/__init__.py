"""Benchmarks, one per file: `comparisons(tiny=...)` yields the comparisons; `tiny` is a smoke test."""
