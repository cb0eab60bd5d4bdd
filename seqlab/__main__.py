"""`python -m seqlab` is the command `seqlab`."""

import sys

if not sys.flags.safe_path:
    # The current folder, which -m puts first: a jax.py there would be imported.
    del sys.path[0]

from seqlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
