"""Loading of runs, and studies of them: comparisons, caches, gates, pictures."""
