"""What fits, how fast, how many dollars: `python estimate.py {reproduce,predict,plan} --help`."""

import sys

from moejax.cli import estimate_main

if __name__ == "__main__":
    sys.exit(estimate_main())
