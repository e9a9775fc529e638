"""A finished run's folder, or a model's: its experiment, its model, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import config as experiments
from moejax.config import Experiment
from moejax.config_mesh import MeshConfig
from moejax.contents import MadeOf, base_content, tokenizer_content
from moejax.data import chat
from moejax.data.ends import Ends, ends_of
from moejax.data.tokenizer import check_vocabulary, load_tokenizer
from moejax.errors import UserError
from moejax.hub import peft, weights
from moejax.hub.model import architecture, base_folder, create_model, laid_out, placed
from moejax.hub.quantized_cache import Content
from moejax.mesh import Devices, of_model
from moejax.models.build import Model, build
from moejax.models.config import Architecture, Quantization
from moejax.runs.devices import devices_of


class Loaded(NamedTuple):
    """make: loads the model. template: how an instruction becomes a prompt (data.template). ends: of its answers."""

    make: Callable[[], Model]
    sizes: Architecture
    tokenizer: Any
    template: str
    ends: Ends


def open_run(folder: Path) -> Experiment:
    """The experiment of a finished run. Raises UserError where there is none."""
    if not (folder / "config.yaml").is_file() or not any((folder / part).is_dir() for part in ("adapter", "model")):
        raise UserError(f"{folder} is not a finished run (expected config.yaml, and adapter/ or model/, in it)")
    return experiments.load(folder / "config.yaml")


def check_made_of(folder: Path, experiment: Experiment, model_folder: Path | None, tokenizer: Any) -> None:
    """Raises UserError where base or tokenizer are others than those that the run in `folder` began with, as far as their files tell."""
    source = experiment.tokenizer or model_folder
    now: dict[str, Any] = {} if tokenizer is None else {"tokenizer": tokenizer_content(str(source), tokenizer)}
    if model_folder is not None:
        now |= {"base_config": base_content(model_folder), "base_files": weights.files_of(model_folder)}
    _same(folder, experiment, now)


def _same(folder: Path, experiment: Experiment, now: dict[str, Any]) -> None:
    found = (experiment.made_of or MadeOf()).differences(MadeOf(platform=jax.default_backend(), **now))
    if found:
        told = "; ".join(f"{part}: {text}" for part, text in found.items())
        raise UserError(f"{folder} was made of another content. Changed: {told}. Put back what the run was made of")


def base_model(
    folder: Path, experiment: Experiment, sizes: Architecture, model_folder: Path | None, devices: Devices | None = None
) -> Model:
    """What the run in `folder` began with. Raises UserError where its weights have become others since."""
    content = Content()
    model = create_model(experiment, sizes, model_folder, content, devices)
    check_base(folder, experiment, content.value)
    return placed(model, devices)


def check_base(folder: Path, experiment: Experiment, content: str | None) -> None:
    """Raises UserError where the hash of the base's weights is another than that of what the run in `folder` began with."""
    _same(folder, experiment, {"base": content})


def tuned(experiment: Experiment, sizes: Architecture, folder: Path, base: Model) -> Model:
    """The model that the run in `folder` trained, on the devices of `base`. With an adapter it is `base`, changed in place."""
    devices = of_model(nnx.state(base))
    if experiment.adapter is None:
        return placed(create_model(experiment, sizes, folder / "model", None, devices), devices)
    peft.load_adapter(base, folder / "adapter")
    return placed(base, devices)


def load(folder: Path, base: bool = False, mesh: MeshConfig | None = None) -> Loaded:
    """What makes a run's tuned model (adapter next to the weights, not merged into them), its sizes, tokenizer, template and ends.

    base: the model that the run began with, as it was then (in 4 bits where the run has it so). A model's folder in Hub layout is loaded
    in bf16 (on a CPU in fp32), and asked by `own_template`. mesh: the devices that it is to lie on (`mesh_of`). Raises UserError where
    there is nothing of the kind.
    """
    if not (folder / "config.yaml").exists() and (folder / "config.json").is_file():
        return _load_model(folder, base, mesh)
    experiment = open_run(folder)
    model_folder = base_folder(experiment)
    if experiment.tokenizer is None and model_folder is None:
        raise UserError(f"{folder}: its config names no tokenizer, so a prompt cannot become tokens")
    if base and model_folder is None and experiment.adapter is None:
        raise UserError(
            f"{folder} is a run without adapter and without model.source: it began with random weights, not with a base"
        )
    if experiment.adapter is not None and not base and not (folder / "adapter").is_dir():
        raise UserError(
            f"{folder}: its config has an adapter, and there is no adapter/ in it: was the run stopped before its end?"
        )
    sizes = architecture(experiment, model_folder)
    tokenizer = load_tokenizer(experiment.tokenizer or str(model_folder), experiment.added_tokens)
    check_vocabulary(tokenizer, sizes.vocab_size)
    check_made_of(folder, experiment, model_folder, tokenizer)
    devices = devices_of(mesh, sizes, experiment)

    def make() -> Model:
        if experiment.adapter is None and not base:  # all weights were trained: nothing of the base is needed
            return placed(create_model(experiment, sizes, folder / "model", None, devices), devices)
        model = base_model(folder, experiment, sizes, model_folder, devices)
        return model if base else tuned(experiment, sizes, folder, model)  # a fresh adapter's B is zero: the model is its base

    data = experiment.data
    template = data.template or "mistral"
    chat.settle(tokenizer, template, data.template_args, data.template_date)
    return Loaded(make, sizes, tokenizer, template, ends_of(tokenizer, template, model_folder))


def _load_model(folder: Path, base: bool, mesh: MeshConfig | None) -> Loaded:
    if base:
        raise UserError(
            f"{folder} is a model, and no run: there is no adapter to leave out (without --base it is evaluated as it is)"
        )
    sizes = weights.read_config(folder)
    tokenizer = load_tokenizer(str(folder))
    check_vocabulary(tokenizer, sizes.vocab_size)
    devices = devices_of(mesh, sizes)

    def make() -> Model:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        frozen = None if sizes.expert_format is None else Quantization(modules=())  # nothing but what is in 4 bits already
        model = build(sizes, dtype=dtype, param_dtype=dtype, quantization=frozen)
        if devices is not None:
            laid_out(model, devices)
        return weights.load_weights(model, folder, jax.random.key(0))

    template = own_template(tokenizer)
    return Loaded(make, sizes, tokenizer, template, ends_of(tokenizer, template, folder))


def own_template(tokenizer: Any) -> str:
    """In which a model that no run says it of is asked: its tokenizer's chat template, else `mistral`."""
    return "chat" if getattr(tokenizer, "chat_template", None) else "mistral"
