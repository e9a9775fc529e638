"""Fine-tune a model: `python train.py --config configs/demo.yaml [key.sub=value …]`."""

import sys

from moejax.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
