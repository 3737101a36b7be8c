"""`python -m rmsweep` is `rmsweep`."""

import sys

from rmsweep.cli import main

if __name__ == "__main__":
    sys.exit(main())
