"""Runs as short Python files: each has one `base()`, and its docstring gives the command, the time and the
number to expect.

`parts` holds what several share, `fiddlers` the variations that fit all. A file of your own with a `base()`
serves as well.
"""

if not __name__.startswith("seqlab."):
    raise ImportError(
        "import seqlab.configs, not configs: two copies of one module would hold two sets of classes"
    )
