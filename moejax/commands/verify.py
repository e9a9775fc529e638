"""`moejax verify RUN`: compare the files of a run with their checksums."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")


def run(options: argparse.Namespace) -> int:
    """Print a line for each part. Returns 1 where one is damaged, else 0."""
    from moejax.runs import verify
    from moejax.training import checkpoint

    damaged = 0
    parts = (*verify.files(options.run), *(verify.Verified(f"checkpoints/{step}", why) for step, why in checkpoint.verify(options.run)))
    for part, wrong in parts:
        damaged += bool(wrong)
        print(f"{'DAMAGED' if wrong else 'ok':8} {part}{f': {wrong}' if wrong else ''}")
    print(f"{len(parts)} parts read, {damaged} damaged" + ("; --resume takes the newest checkpoint that is ok" if damaged else ""))
    return 1 if damaged else 0
