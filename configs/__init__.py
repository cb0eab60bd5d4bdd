"""Configs of runs as short Python files: each has one `base()`, and its docstring gives the command, the time
and the expected result.

`parts` holds shared parts, `fiddlers` variations of any config. Your own file with a `base()` works as well.
"""

if not __name__.startswith("seqlab."):
    raise ImportError(
        "import seqlab.configs, not configs: two copies of one module would hold two sets of classes"
    )
