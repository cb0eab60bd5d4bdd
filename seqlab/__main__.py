"""`python -m seqlab` is the command `seqlab`."""

import sys

from seqlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
