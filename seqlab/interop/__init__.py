"""Loading, saving and exporting models: published folders, names of weights, bundles."""
