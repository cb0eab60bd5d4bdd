"""Meshes, shardings, and recurrences over a sequence that is split over devices."""
