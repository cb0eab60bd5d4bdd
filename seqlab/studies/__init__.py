"""Runs as values, and studies over them: comparisons, caches, gates, pictures."""
