"""Arguments shared by several commands: CONFIG with overrides, RUN (positional, or by its old name), GPU names, counts."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.errors import UserError

if TYPE_CHECKING:
    from moejax.config import Experiment
    from moejax.config_mesh import MeshConfig
    from moejax.estimator.links import Link
    from moejax.gpus import GPU
    from moejax.models.config import Architecture

MOST_DEVICES = 1024
RECEIPTS_HELP = "folder with your own measurements: receipts (*.json), or runs with a receipt.json"


def add_config(parser: argparse.ArgumentParser, changes: str = "override config values, e.g. training.epochs=3") -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="config file in YAML (`moejax init` writes one)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help=changes)
    parser.add_argument("--config", dest="file", metavar="CONFIG", help="same as CONFIG")


def settle_config(options: argparse.Namespace, otherwise: str = "") -> None:
    """`options.config` and `options.overrides` as they are meant. Raises UserError where no config is given, and nothing `otherwise`."""
    if options.file is not None:  # what stands in its place is a change
        options.overrides = [text for text in (options.config, *options.overrides) if text is not None]
        options.config = options.file
    if options.config is None:
        raise UserError(f"which experiment? Give its CONFIG (`moejax init` writes one){otherwise}")


class _Old(argparse.Action):
    """An option's name of the release before: it does the same, and says what it is called now. In no help."""

    def __init__(self, now: str, **settings: Any):
        super().__init__(**settings | {"help": argparse.SUPPRESS})
        self.now = now

    def __call__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, value: Any, option: str | None = None) -> None:
        print(f"note: {option} is now {self.now}; the old name goes with the next release", file=sys.stderr)
        setattr(options, self.dest, value)


def add_old(parser: argparse.ArgumentParser, name: str, now: str, **settings: Any) -> None:
    parser.add_argument(name, action=_Old, now=now, **settings)


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a finished run, e.g. runs/demo, or of a model in Hub layout")
    add_old(parser, "--run", "RUN by itself", dest="folder")


def settle_run(options: argparse.Namespace) -> None:
    """`options.run` as it is meant. Raises UserError where none is given, or two are."""
    if (options.run is None) == (options.folder is None):
        raise UserError("which run? Give one RUN: a finished run's folder, e.g. runs/demo, or a model's in Hub layout")
    options.run = options.folder or options.run


def add_mesh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="mesh.key=value",
        help="devices and processes, e.g. mesh.devices=2 (default: all, with the run's own mesh; mesh=null: one device)",
    )  # fmt: skip


@contextmanager
def on_mesh(options: argparse.Namespace) -> Iterator[MeshConfig | None]:
    """Around a command that asks the model of `options.run`: gives how it is to lie on devices. Several processes meet here; the first
    one alone prints. Raises UserError where a scheduler started several that do not know of each other."""
    from moejax import processes
    from moejax.runs.devices import mesh_of

    mesh = mesh_of(Path(options.run), options.overrides)
    if "mesh=null" not in options.overrides:
        processes.check_started(mesh, "this command")
    if not processes.started_with(mesh):
        yield mesh
        return
    asked = {name: value for name, value in vars(options).items() if name != "overrides"}
    assert mesh is not None
    asked["mesh"] = mesh.model_dump(mode="json", include={"devices", "weights"})
    with ExitStack() as stack:
        stack.enter_context(processes.together(mesh, {"command": json.dumps(asked, sort_keys=True, default=str)}))
        if not processes.is_first():
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        yield mesh


def counts_of(devices: str) -> list[int]:
    """The numbers in --devices. Raises UserError for what are none."""
    texts = [text.strip() for text in devices.split(",") if text.strip()]
    if not texts or not all(text.isdigit() and 1 <= int(text) <= MOST_DEVICES for text in texts):
        raise UserError(f"--devices {devices!r}: expected how many of each card, 1 to {MOST_DEVICES}, e.g. 2 or 1,2,4,8")
    return list(dict.fromkeys(int(text) for text in texts))


def devices_of(options: argparse.Namespace) -> tuple[list[int], Link | None, float]:
    """--devices, --link and --overlap. Raises UserError for what cannot be meant."""
    from moejax.estimator import links

    overlap = options.overlap or 0.0
    if not 0 <= overlap <= 1:
        raise UserError(f"--overlap {overlap:g}: expected a share, 0 to 1")
    link = None if options.link is None else links.given(options.link)
    return counts_of(options.devices) if options.devices else [1], link, overlap


def with_weights(experiment: Experiment, weights: str | None) -> Experiment:
    """The experiment with --weights in the place of its `mesh.weights`. Raises UserError where it cannot have them."""
    from moejax.config_mesh import MeshConfig

    if weights is None:
        return experiment
    mesh = (experiment.mesh or MeshConfig.model_validate({})).model_copy(update={"weights": weights, "devices": None})
    try:
        mesh.check(experiment)
    except ValueError as error:
        raise UserError(str(error)) from None
    return experiment.model_copy(update={"mesh": mesh})


def on_devices(experiment: Experiment, sizes: Architecture, devices: int | None) -> Experiment:
    """The experiment on as many devices as --devices says, or its mesh. Raises UserError where neither does, and for experts that they do
    not divide."""
    from moejax.config_mesh import MeshConfig

    mesh = experiment.mesh
    count = devices or (1 if mesh is None else mesh.devices)
    if count is None:
        raise UserError("mesh.devices = null are all that there are, and none is looked at here: how many? Give --devices N")
    if count == 1:
        return experiment.model_copy(update={"mesh": None})
    mesh = (mesh or MeshConfig.model_validate({})).model_copy(update={"devices": count})
    try:
        mesh.check_experts(count, sizes.num_experts)
    except ValueError as error:
        raise UserError(str(error)) from None
    return experiment.model_copy(update={"mesh": mesh})


def with_experts(sizes: Architecture, experts_per_token: int | None) -> Architecture:
    """The sizes with --experts-per-token. Raises UserError for what they cannot have."""
    if experts_per_token is None:
        return sizes
    try:
        return sizes.replace(experts_per_token=experts_per_token)
    except ValueError as error:
        raise UserError(f"--experts-per-token {experts_per_token}: {error}") from None


def names_of(gpus: str) -> list[str]:
    """The names in --gpu. Raises UserError where there is none."""
    names = [name.strip() for name in gpus.split(",") if name.strip()]
    if not names:
        raise UserError(f"--gpu {gpus!r}: expected names of GPUs, e.g. A40,H100")
    return names


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Raises UserError for an option that is given and is less than 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 1 or more")


def check_kernels(experiment: Experiment, sizes: Architecture, cards: Iterable[GPU]) -> None:
    """Raises UserError where the config asks by name for a kernel that one of the cards cannot run, as a start on it does."""
    m = experiment.model
    if m.moe_backend in ("ragged", "decode") or m.attention == "flash" or m.scan == "kernel":
        from moejax.training import experts  # jax comes with it

        for card in cards:
            if card.cuda_name:
                experts.check(experiment, sizes, card.cuda_name)
