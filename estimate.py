"""What fits, how fast, how many dollars: `python estimate.py {reproduce,predict,plan,memory,fit,compare} --help`."""

import sys

from moejax.cli import estimate_main

if __name__ == "__main__":
    sys.exit(estimate_main())
