"""What is trained: recipes and the runs that carry them out."""
