"""placeholder"""

if not __name__.startswith("seqlab."):
    raise ImportError("import seqlab.kernels, not kernels: two copies of one module would hold two sets of classes")
