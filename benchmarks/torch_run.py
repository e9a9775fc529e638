"""Train an experiment in PyTorch: the same config, data order, initial weights and LoRA initialization as `train.py`.

    python benchmarks/torch_run.py --config configs/demo.yaml --stack study [--profile] [key.sub=value …]

Stacks: study (transformers 4, PEFT 0.18), today (transformers 5, PEFT 0.21), plain (BlackMamba). The run's folder is runs/NAME-STACK and
holds metrics.jsonl, and with --profile trace.json.gz and step_profile.json: `moejax breakdown runs/NAME-profile runs/NAME-profile-STACK`
draws both. Nothing of PyTorch is imported here: it runs in the environment that `make reference4` or `make reference5` builds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "pytorch")]

import contract
import kept

from moejax import config as configuration
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.profiling import schema

OUT_OF_MEMORY = 3


def reference_python(stack: str, given: Path | None = None) -> Path:
    """Python of the stack's environment. Raises UserError naming the make target that builds it."""
    target = contract.MAKE[stack]
    python = given or HERE.parent / f".venv-{target}" / "bin" / "python"
    if not python.exists():
        raise UserError(f"{python} does not exist: `make {target}` builds the PyTorch environment of the stack {stack!r}")
    return python


def add_references(parser: argparse.ArgumentParser) -> None:
    """Options for an environment that is not the Makefile's."""
    for target in sorted(set(contract.MAKE.values())):
        parser.add_argument(f"--{target}", type=Path, help="Python of that environment, if it is not the Makefile's")


def references(options: argparse.Namespace, stacks: Collection[str]) -> dict[str, Path]:
    """Python of each stack's environment. Raises UserError."""
    return {stack: reference_python(stack, getattr(options, contract.MAKE[stack])) for stack in contract.STACKS if stack in stacks}


def command(handover: Path, stack: str, python: Path, arguments: list[str]) -> list[str]:
    return [str(python), str(HERE / "pytorch" / "run.py"), str(handover), "--stack", stack, *arguments]


def run(experiment: Experiment, stack: str, folder: Path, python: Path, arguments: Sequence[str] = ()) -> None:
    """Hand the experiment over into folder/handover and train it into `folder`. Raises UserError with what the runner said."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is written down here needs no accelerator
    import handover

    handover.write(experiment, folder / "handover", stack_name=stack)
    train(folder / "handover", stack, folder, python, arguments)


def moejax(arguments: Sequence[str], folder: Path) -> None:
    """moejax's own command in a process of its own, into `folder`, whatever was there before. Raises UserError."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "moejax.cli", *arguments]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"moejax {arguments[0]} ended with exit code {done.returncode}: {done.stderr.strip()[-1000:]}")


def train(handover: Path, stack: str, folder: Path, python: Path, arguments: Sequence[str]) -> None:
    """Train what was handed over, into `folder`. Raises UserError with what the runner said."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command(handover, stack, python, ["--out", str(folder), *arguments]),
        env=environment, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode in (2, OUT_OF_MEMORY):
        raise UserError(f"PyTorch ({stack}): {done.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
    if done.returncode:
        raise UserError(f"PyTorch ({stack}) ended with exit code {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    if "--profile" in arguments:
        schema.read(folder)  # it must hold to the contract


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="experiment in YAML (see configs/)")
    parser.add_argument("--stack", choices=contract.STACKS, required=True)
    parser.add_argument("--profile", action="store_true", help="only the first steps, some traced, as `moejax profile` does")
    parser.add_argument("--base", choices=("nf4", "dequantized"), default="dequantized", help="how NF4 weights are held")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch finds it")
    add_references(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    arguments = ["--base", options.base]
    arguments += ["--profile"] if options.profile else []
    arguments += ["--device", options.device] if options.device else []
    load = configuration.load_profiled if options.profile else configuration.load
    experiment = load(options.config, options.overrides)
    folder = Path(experiment.runs_dir) / f"{experiment.name}-{options.stack}"
    python = references(options, [options.stack])[options.stack]
    run(experiment, options.stack, folder, python, arguments)
    print(f"everything is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
