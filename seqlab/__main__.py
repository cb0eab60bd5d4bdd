"""`python -m seqlab` is the command `seqlab`."""

import sys

if not sys.flags.safe_path:
    del sys.path[
        0
    ]  # the folder one works in: -m puts it first, and a jax.py that lies there would be imported

from seqlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
