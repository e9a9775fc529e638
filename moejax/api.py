"""The Python API: load models, compute losses and gradients, train, estimate memory.

Everything here is available as `moejax.NAME`. It prints nothing and raises UserError for mistakes of the caller.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moejax import config as experiments
from moejax import gpus, processes, tpus
from moejax.compiler_options import jit
from moejax.config import Experiment
from moejax.config_data import DataConfig, whole_row
from moejax.config_file import read
from moejax.data import conversation
from moejax.data.batch import Batch
from moejax.data.batching import GivenBatches, assemble
from moejax.data.ends import Ends, ends_of
from moejax.data.sources import of_records
from moejax.data.tokenize import prompts, tokenize
from moejax.data.tokenizer import check_vocabulary, load_tokenizer, save_tokenizer
from moejax.device import HERE, this_machine
from moejax.errors import UserError
from moejax.estimator import memory, slices
from moejax.estimator.sizes import architecture_of, model_folder
from moejax.evaluation.generate import Sampling, generate, said
from moejax.evaluation.loglikelihood import encoded
from moejax.hub import model as hub_model
from moejax.hub import peft, weights
from moejax.mesh import Devices, of_model
from moejax.models.build import Model
from moejax.runs import open as runs
from moejax.runs import tokens
from moejax.runs.devices import devices_of, joined
from moejax.runtime import prepare_jax
from moejax.training import experts, loop
from moejax.training.oracle import GIVEN, Oracle, oracle
from moejax.training.program import Own, split
from moejax.training.step import Loss, Objective, gradients_over, sums

Config = str | Path | Mapping[str, Any] | Experiment
Changes = Mapping[str, Any] | Sequence[str]

__all__ = ["Batch", "LanguageModel", "MemoryEstimate", "Run", "estimate_memory", "load", "loss", "loss_and_grads", "train"]


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model with its tokenizer and prompt template.

    model: a flax.nnx module; `hidden, stats = model(tokens)` with tokens int32 [B, T]; `model.logits(hidden)` is fp32 [B, T, V].
    tokenizer: from transformers. template: the config's data.template. source: name of the base model.
    """

    model: Model
    tokenizer: Any
    template: str
    ends: Ends
    source: str

    def generate(
        self, prompt: str | Sequence[str], *, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0,
        top_k: int | None = None, seed: int = 0, stop: Sequence[str] = (),
    ) -> Any:  # fmt: skip
        """Continue one text (returns a string) or several (returns a list), without a template.

        temperature 0: greedy decoding; else sampling with top_k and top_p. stop: texts that end an answer. Raises UserError for a
        prompt that is empty or too long.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        asked = [encoded(self.tokenizer, text) for text in texts]
        answers = self._answers(asked, max_new_tokens, Sampling(temperature, top_p, top_k, seed), stop)
        return answers[0] if isinstance(prompt, str) else answers

    def chat(
        self, messages: str | Sequence[Mapping[str, Any]], *, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0,
        top_k: int | None = None, seed: int = 0, stop: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """Answer a message or a conversation `[{"role": "user", "content": …}, …]` in the model's template. Options as in `generate`."""
        if isinstance(messages, str):
            if self.template == "text":
                raise UserError("this model was trained with data.template = text, which has no instructions: use generate")
            record: dict[str, Any] = {"instruction": messages, "input": "", "output": ""}
        else:
            talk = conversation.to_answer({"messages": [dict(message) for message in messages]}, "messages")
            record = {"conversation": talk}
        _, asked = prompts([record], self.tokenizer, self.template, "message")
        return self._answers(asked, max_new_tokens, Sampling(temperature, top_p, top_k, seed), stop)[0]

    def _answers(self, asked: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, stop: Sequence[str]) -> list[str]:
        tokens = generate(self.model, asked, max_new_tokens=max_new_tokens, end=self.ends.ids, sampling=sampling)
        return [said(self.tokenizer, answer, self.ends, stop)[0] for answer in tokens]

    def batch(self, records: Sequence[Mapping[str, Any] | str], *, max_length: int = 2048) -> Batch:
        """Make a Batch of [rows, T] from records, one per row, padded on the right to a multiple of 16 tokens.

        A record: `{"instruction": …, "output": …}` (optionally "input"), with the loss on the output; `{"messages": […]}`, on the
        assistant's messages; or a string, on all of it. Longer ones are cut at `max_length`. Raises UserError with the record's number.
        """
        texts = [isinstance(record, str) for record in records]
        if not texts or any(texts) != all(texts):
            raise UserError("records: expected texts, or records with an instruction and an output, at least one and all of one kind")
        data = DataConfig.model_validate({"batching": "fixed", "template": "text" if texts[0] else self.template})
        found = of_records([{"text": r} if isinstance(r, str) else dict(r) for r in records], data)
        queries = tokenize(found, self.tokenizer, "text" if texts[0] else self.template, max_length, "records").queries
        return assemble([[query] for query in queries], len(queries), whole_row(max(len(query.ids) for query in queries)))

    def save_adapter(self, folder: str | Path, *, fused: bool = False) -> None:
        """Write the adapter in PEFT's format; fused: in that of transformers 5 with PEFT 0.19 and later. An adapter with rows of added
        tokens includes the tokenizer."""
        if not has_adapter(self.model):
            raise UserError("this model has no adapter: load it with adapter={…}")
        graphdef, trainable, frozen = split(self.model, full=False)
        model = nnx.merge(graphdef, jax.tree.map(processes.on_host, trainable), frozen)
        if not processes.is_first():
            return
        peft.save_adapter(model, Path(folder), self.source, fused=fused)
        rows = self.model.embed_rows
        if rows is not None and set(rows.ids) <= set(self.tokenizer.get_vocab().values()):  # the base's own may not know them
            try:
                save_tokenizer(self.tokenizer, Path(folder))
            except OSError as error:
                raise UserError(f"{folder}: the tokenizer could not be written there ({error}): free some space") from None


def has_adapter(model: Model) -> bool:
    return bool(jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))


def load(
    source: str | Path, *, base: bool = False, quantization: str | None = None, adapter: Mapping[str, Any] | None = None,
    dtype: str | None = None, seed: int = 0, download: str = "whole", placement: Mapping[str, Any] | None = None,
    mesh: Mapping[str, Any] | None = None,
) -> LanguageModel:  # fmt: skip
    """Load a finished run (base: its base model), a model folder in Hub layout, or a Hub id, `org/name@REV`.

    mesh: keys of the config's mesh section, e.g. {"weights": "experts"} (default: a run's own on all devices here; a model on one).

    For models only: quantization "nf4": 4-bit weights; adapter: keys of the config's adapter section ({}: defaults), for a new LoRA
    adapter from `seed`, or a saved one with "init_from"; dtype of computation, "bfloat16" or "float32" (default: bfloat16, on a CPU
    float32); download and placement: as in the config. Raises UserError for bad files.
    """
    path = Path(source)
    if (path / "config.yaml").exists():
        if quantization is not None or adapter is not None or dtype is not None or download != "whole" or placement is not None:
            own = "quantization, adapter, dtype, download and placement"
            raise UserError(f"{source} is a run, which says itself how its model is stored: leave {own} out")
        opened = runs.load(path, base, joined(path, mesh))
        return LanguageModel(opened.make(), opened.tokenizer, opened.template, opened.ends, runs.open_run(path).model.source or "")
    if base:
        raise UserError(f"{source} is not a run: there is no adapter to leave out (base=True)")
    if dtype not in (None, "bfloat16", "float32"):
        raise UserError(f"dtype = {dtype!r}: expected 'bfloat16' or 'float32'")
    if quantization not in (None, "nf4"):
        raise UserError(f"quantization = {quantization!r}: expected 'nf4' or None")
    compute = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    name, _, revision = str(source).partition("@") if not path.is_dir() else (str(source), "", "")
    content = {
        "name": "loaded", "seed": seed, "model": {"source": name, "revision": revision or None, "download": download},
        "quantization": {"format": quantization or "none"}, "adapter": None if adapter is None else dict(adapter),
        "data": {"batching": "fixed", "row_tokens": 16, "max_length": 16},
        "training": {"steps": 1, "compute_dtype": compute, "param_dtype": compute}, "placement": dict(placement or {}),
    }  # fmt: skip
    if (quantization is not None or placement is not None) and adapter is None:
        content["adapter"] = {}  # frozen weights alone could not be trained, and a new adapter changes nothing
    experiment = experiments.of(content, f"load({str(source)!r})")
    asked = joined(path, mesh)
    folder = hub_model.base_folder(experiment)
    assert folder is not None
    experiment = hub_model.with_adapters_rows(experiment, weights.read_config(folder).vocab_size)
    experiment = experiment.with_defaults(hub_model.architecture(experiment, folder))
    begun = None if experiment.adapter is None else experiment.adapter.init_from
    beside = None if begun is None else weights.resolve(begun, field="adapter.init_from")  # with the tokens that were added
    tokenizer = load_tokenizer(str(beside if beside is not None and (beside / "tokenizer.json").is_file() else folder))
    sizes = hub_model.architecture(experiment, folder)
    check_vocabulary(tokenizer, sizes.vocab_size)
    devices, template = devices_of(asked, sizes, experiment), runs.own_template(tokenizer)
    return LanguageModel(hub_model.load(name, experiment, devices), tokenizer, template, ends_of(tokenizer, template, folder), name)


def _batch(given: Batch | Any) -> Batch:
    """Tokens int32 [B, T] as a batch in which every token is real, and every next one is predicted."""
    if isinstance(given, Batch):
        return given
    tokens = np.asarray(given)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise UserError(f"tokens: expected integers [rows, length], got {tokens.dtype} {list(tokens.shape)}")
    mask = np.ones(tokens.shape, np.float32)
    mask[:, -1] = 0
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens.astype(np.int32), np.roll(tokens, -1, 1).astype(np.int32), mask, np.ones(tokens.shape, np.int32), positions)


@partial(jit, static_argnums=(0, 4, 5))
def _mean(objective: Objective, trainable: Any, frozen: Any, batch: Batch, devices: Devices | None, grads: bool) -> Any:
    def mean(trainable: Any) -> jax.Array:
        return sums(objective, trainable, frozen, batch, None)[0] / weight

    weight = jnp.maximum(jnp.sum(batch.loss_mask), 1)
    if devices is None:
        return jax.value_and_grad(mean)(trainable) if grads else mean(trainable)
    found, summed = gradients_over(devices, objective)(trainable, frozen, batch)
    return (found / weight, jax.tree.map(lambda g: g / weight.astype(g.dtype), summed)) if grads else found / weight


def _asked(model: Model, batch: Any, remat: str, loss: Loss | None) -> tuple[Objective, Any, Any, Batch, Devices | None]:
    full = not has_adapter(model)
    graphdef, trainable, frozen = split(model, full)
    devices, rows = of_model(nnx.state(model)), _batch(batch)
    if devices is not None:  # which have as many rows each, some of padding
        more = devices.whole_rows(len(rows.tokens)) - len(rows.tokens)
        rows = Batch(*(np.pad(np.asarray(part), ((0, more), (0, 0))) for part in rows))
    return Objective(graphdef, full=full, remat=remat, loss=loss), trainable, frozen, rows, devices


def loss(model: Model, batch: Batch | Any, *, own: Loss | None = None) -> jax.Array:
    """Mean cross-entropy per supervised token: fp32 scalar, in nats.

    batch: from `LanguageModel.batch`, or tokens int32 [B, T] for next-token prediction. own: a loss function, as in `train`.
    """
    return _mean(*_asked(model, batch, "none", own), False)  # type: ignore[no-any-return]


def loss_and_grads(model: Model, batch: Batch | Any, *, remat: str = "full", own: Loss | None = None) -> tuple[jax.Array, nnx.State]:
    """`loss` and its gradients for the adapter (nnx.LoRAParam), or without one for all weights (nnx.Param).

    The gradients fit `nnx.Optimizer(model, …, wrt=nnx.LoRAParam).update(model, gradients)`. Compiled once per batch shape. remat:
    "none", "dots", "full" (recompute every layer in the backward pass) or "offload" (full, with saved activations in host memory).
    """
    return _mean(*_asked(model, batch, remat, own), True)  # type: ignore[no-any-return]


class Run(NamedTuple):
    """A finished run. folder: its files; history: one record per step, as in metrics.jsonl; stopped: ended by a signal, resumable."""

    folder: Path
    steps: int
    history: list[dict[str, Any]]
    stopped: bool

    @property
    def losses(self) -> list[float]:
        """Loss of each step in this process."""
        return [record["loss"] for record in self.history]

    def load(self) -> LanguageModel:
        """Load the tuned model."""
        return load(self.folder)


def experiment_of(config: Config, changes: Changes = ()) -> Experiment:
    """A config's file, its content, or an experiment; with changes as {"training.steps": 10} or ["training.steps=10"]."""
    if isinstance(changes, str):
        raise UserError(f"changes = {changes!r}: expected a mapping or a list of texts, e.g. {{'training.steps': 10}}")
    if isinstance(config, str | Path):
        return experiments.of(read(config, ()), str(config), changes)
    return experiments.of(config.model_dump(mode="json") if isinstance(config, Experiment) else config, "config", changes)


def train(
    config: Config, changes: Changes = (), *, resume: bool = False, optimizer: optax.GradientTransformation | None = None,
    loss: Loss | None = None, batches: Sequence[Batch] | Callable[[int], Sequence[Batch]] | None = None,
) -> Run:  # fmt: skip
    """Train like `python train.py --config`, into a run folder.

    config: a YAML file, its content as a dict, or an Experiment. changes: {"training.steps": 10} or ["training.steps=10"].
    optimizer: replaces the training section's optimizer, schedule and clipping. loss(model, batch, remat=…, dropout_key=…) ->
    (sum over the micro-batch's supervised tokens, stats of `model(…)`): replaces cross-entropy; gradients are divided by the
    supervised tokens of the step. batches: replaces the data section: [rows, T] with equal rows, T a multiple of 16; a sequence, or
    a function of the epoch. To resume, pass the same objects again: they are not saved. Raises UserError.
    """
    experiment, given = experiment_of(config, changes), None
    if experiment.preference is not None and (loss is not None or batches is not None):
        raise UserError("preference is a loss over pairs of the data section: leave loss and batches out, or set preference to null")
    if batches is not None:
        given = GivenBatches(batches)
        length = given.longest
        data = {"batching": "fixed", "batch_rows": given.batch_rows, "row_tokens": length, "max_length": length}
        experiment = experiments.of(experiment.model_dump(mode="json") | {"data": data}, "config with own batches")
    prepare_jax(experiment.device)
    trainer = loop.trained(experiment, resume=resume, own=Own(optimizer, loss, given))
    return Run(trainer.folder, trainer.step, list(trainer.history), trainer.stopped is not None)


class MemoryEstimate(NamedTuple):
    """Peak memory of a training step. rows: as requested, or the largest number that fits; each has row_tokens tokens. peak_bytes: None
    where no row fits. usable_bytes: memory available to a run. by: "compiler" or "closed form", with the reason in `why`."""

    gpu: str
    rows: int
    row_tokens: int
    peak_bytes: int | None
    usable_bytes: int
    by: str
    why: str | None

    @property
    def fits(self) -> bool:
        return self.peak_bytes is not None and self.peak_bytes <= self.usable_bytes


def estimate_memory(
    config: Config, changes: Changes = (), *, gpu: str = HERE, rows: int | None = None, seq_len: int | None = None,
    closed_form: bool = False,
) -> MemoryEstimate:  # fmt: skip
    """Estimate the memory of a training step on a GPU or TPU slice by name ("here": this machine).

    rows: number of rows (None: the largest that fits). On several devices rows are of all, bytes of each; a slice ("v5e-8") takes the
    config's mesh.weights, without a mesh those with which most rows fit. seq_len: tokens per row (default: the config's longest).
    Uses the compiler where possible (for another GPU with the extra `aot`, for a TPU `aot-tpu`), else the closed form, with an error of
    about 3 % (a TPU: 14 %). Raises UserError.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    experiment = experiment_of(config, changes)
    if experiment.training.remat == "auto":
        experiment = experiment.changed("training", remat="full")
    experiment = tokens.with_rows(experiment, model_folder(experiment), fetch=False)
    sizes = architecture_of(experiment)
    row_tokens = whole_row(seq_len or experiment.data.longest_text)
    if row_tokens > sizes.max_position_embeddings:
        raise UserError(f"rows of {row_tokens} tokens exceed the model's max_position_embeddings = {sizes.max_position_embeddings}")
    if rows is not None and rows < 1:
        raise UserError(f"rows = {rows}: expected 1 or more")
    chips = None if gpu == HERE else tpus.find(gpu)
    if chips is not None:
        slices.check(chips, experiment)
        modes, refused = slices.modes(chips, experiment, sizes)
        own = [e for e in modes if experiment.mesh is not None and e.mesh is not None and e.mesh.weights == experiment.mesh.weights]
        if not modes:
            raise UserError("; ".join(refused))
        card, asked = chips.chip, own or modes
    else:
        card, asked = this_machine(experiment.device.memory_fraction) if gpu == HERE else gpus.find(gpu), [experiment]
        if card.cuda_name:
            experts.check(experiment, sizes, card.cuda_name)
    limit = int(memory.usable_bytes(card, experiment.device.memory_fraction))
    found = [_estimated(oracle(e, sizes, card, row_tokens, closed_form), rows, limit) for e in asked]
    return max(found, key=lambda m: (m.rows, -(m.peak_bytes or 0)))


def _estimated(peaks: Oracle, rows: int | None, limit: int) -> MemoryEstimate:
    n = peaks.devices
    if rows is not None and rows % n:
        raise UserError(f"rows = {rows}: of all {n} devices together, which do not divide them")
    if rows is None:
        largest = peaks.largest(limit)
        rows, peak = largest.rows, largest.peak if largest.rows else None
    else:
        peak = peaks.peak_bytes(rows)
    reason = None if peaks.reason == GIVEN else peaks.reason
    return MemoryEstimate(peaks.named, rows, peaks.row_tokens, peak, limit, "closed form" if peaks.reason else "compiler", reason)
