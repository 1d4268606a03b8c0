"""`python -m raytune_autotuner`."""

import sys

from raytune_autotuner.cli import main

if __name__ == "__main__":
    sys.exit(main())
