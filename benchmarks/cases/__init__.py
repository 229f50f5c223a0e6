"""One file a benchmark: `comparisons(tiny=...)` yields what is to be compared; `tiny` shows that it runs, nothing more."""
