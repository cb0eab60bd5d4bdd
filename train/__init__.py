"""Training: data pipelines, the jitted step, the loop, checkpoints and metrics."""

if not __name__.startswith("seqlab."):
    raise ImportError(
        "import seqlab.train, not train: two copies of one module would hold two sets of classes"
    )
