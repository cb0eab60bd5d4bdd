"""placeholder"""

if not __name__.startswith("seqlab."):
    raise ImportError("import seqlab.configs, not configs: two copies of one module would hold two sets of classes")
