"""Weights and models in and out: published folders, names of weights, exported bundles."""
