"""`moejax export RUN --out DIR`: what a run trained, for PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path

from moejax.runtime import prepare_jax_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a finished run's folder, e.g. runs/demo")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument(
        "--format", choices=("peft", "fused", "merged"), default=None, help="default: the adapter if one was trained, else the model; "
        "fused: an adapter for transformers 5 with PEFT 0.19 or later"
    )
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="reload what was written, compare its logits")
    parser.add_argument("--tolerance", type=float, metavar="SHARE", help="largest logit difference, as a share of the "
        "largest logit (default: 0.05 of a merged model, 0.00001 of an adapter)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    prepare_jax_for(options.run)
    from moejax.runs.export import export

    export(Path(options.run), Path(options.out), options.format, options.verify, options.tolerance)
    return 0
