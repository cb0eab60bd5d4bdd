"""Memories that are matrices: linear attention with and without decay, and the delta rule."""
