"""What comes before a run's first step, cheap things first: what is wrong costs seconds, and no download of weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from moejax import device, processes
from moejax.config import Experiment
from moejax.data.examples import told
from moejax.data.pipeline import Dataset
from moejax.data.pipeline import load as load_data
from moejax.data.tokenizer import check_vocabulary, load_tokenizer
from moejax.errors import UserError
from moejax.estimator.units import counted
from moejax.hub import weights
from moejax.hub.model import (
    architecture,
    base_folder,
    check_disk,
    check_host_memory,
    continue_adapter,
    create_model,
    model_arguments,
)  # fmt: skip
from moejax.hub.quantized_cache import Content
from moejax.models.build import build
from moejax.models.config import Architecture
from moejax.models.ops import choice, host
from moejax.progress import say, waiting
from moejax.runs import folders, pinning, tokens
from moejax.training import accumulation, experts, low_precision, placement, preference, remat, scoring
from moejax.training.identity import Identity
from moejax.training.optimizer import kept_wide
from moejax.training.program import NOTHING_OWN, Own, TrainProgram, devices_of
from moejax.training.run_steps import check_profile, check_steps, longest_row, total_steps
from moejax.tuner import use

OLDEST_WITH_BF16 = (8, 0)


class Started(NamedTuple):
    """A run that is ready for its first step. experiment: all of it settled, as the run's config.yaml has it; program: with weights."""

    experiment: Experiment
    folder: Path
    program: TrainProgram
    dataset: Dataset
    tokenizer: Any
    asked: scoring.HeldOut | None


def start(experiment: Experiment, folder: Path, *, resume: bool, own: Own = NOTHING_OWN) -> Started:
    """Read, check and load, in a folder that is this process's alone. Raises UserError."""
    if resume:
        experiment = pinning.adopted(remat.of_run(experiment))
    # Of several processes the first may have begun to write there.
    begun = folders.prepare(experiment, resume=resume) if resume or processes.is_first() else None
    source = experiment.model.source
    model_folder = None if source is None else weights.resolve(source, experiment.model.revision, weights=False)
    experiment = tokens.with_rows(pinning.pinned(experiment, model_folder), model_folder)
    config = architecture(experiment, model_folder)
    experiment = experiment.with_defaults(config)
    devices_of(experiment, config)
    use.for_run(experiment, folder, resume=resume)
    experts.check(experiment, config, choice.here())
    kernels = [line for told in (experts.announce_attention, experts.announce_scan) for line in told(experiment, config, choice.here())]
    wide = kept_wide(experiment, config) if own.optimizer is None else []
    for line in (*kernels, *experts.precision(experiment, choice.here()), *preference.told(experiment), *wide):
        say(line)
    abstract = build(config, **model_arguments(experiment))
    say(*check_host_memory(abstract))
    if source is not None and model_folder is not None and Path(source).is_dir():
        weights.check_files(abstract, model_folder)
    elif model_folder is not None:
        check_disk(experiment, model_folder)
    continue_adapter(experiment, abstract, experiment.model.source)  # one that does not fit is reported before data and weights are read
    tokenizer, asked, dataset = read_data(experiment, config, model_folder, own)
    experiment = as_read(experiment, dataset)
    identity = Identity(experiment, begun if resume else experiment.made_of, resume=resume)
    say(*identity.of_data(tokenizer, asked, dataset, model_folder))
    processes.same(identity.now.model_dump(mode="json", exclude={"platform", "changed", "base"}))
    steps = total_steps(experiment, dataset)
    begun_choosing = time.perf_counter()
    if experiment.placement.experts == "auto":
        experiment = placement.resolve(experiment, config, steps)
        say(*check_host_memory(build(config, **model_arguments(experiment))))
    experiment = remat.resolve(accumulation.resolve(experiment, config, steps, own), config, steps)
    choosing = time.perf_counter() - begun_choosing
    processes.same({"settings by this machine": processes.as_text(experiment)}, texts=True)  # one program is not another's
    say(experts.announce(experiment, config), *placement.announce(experiment, config))
    # The steps of the whole run stand in the program: in its schedule.
    program = TrainProgram(experiment.changed("training", steps=steps), config, traced=experiment.profile is not None, own=own)
    program.choosing_seconds = choosing
    fit(program, experiment.data.batch_rows, longest_row(experiment, dataset))
    if model_folder is not None:
        with waiting(f"weights of {experiment.model.source}"):
            model_folder = base_folder(experiment)
        say(*identity.compare(base_files=None if model_folder is None else weights.files_of(model_folder)))
    content = Content()
    with waiting("loading the model"):
        model = create_model(experiment, config, model_folder, content, program.devices)
        continue_adapter(experiment, model, experiment.model.source, content.value)
    if model_folder is not None:
        say(*weights.report(model))
    processes.same({"base": content.value})
    say(*identity.compare(base=content.value), *low_precision.warnings(experiment, model))
    program.load(model)
    return Started(identity.written(experiment), folder, program, dataset, tokenizer, asked)


def check_device(experiment: Experiment, device: Any) -> None:
    """device: a jax device. Raises UserError for a GPU that cannot compute what the experiment asks for, and says what would work.

    Before compute capability 8.0 (Ampere) a GPU has no bf16 products: XLA would compute them in fp32, with every weight and activation
    converted on the way, and a run would be slow without a word.
    """
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not capability[:1].isdigit():  # AMD's are names
        return
    t = experiment.training
    asked = {name: getattr(t, name) for name in ("compute_dtype", "param_dtype")}
    wrong = [f"training.{name} = {dtype}" for name, dtype in asked.items() if dtype.startswith("bfloat16")]
    if wrong and tuple(int(part) for part in capability.split(".")[:2]) < OLDEST_WITH_BF16:
        raise UserError(
            f"{device.device_kind} has compute capability {capability}, and {' and '.join(wrong)} needs 8.0 (A100, A40, RTX 30 or newer): "
            "set training.compute_dtype=float32 training.param_dtype=float32 (about twice the memory of activations), or use a newer GPU"
        )


def fit(program: TrainProgram, rows: int, row_tokens: int) -> None:
    """Compile the step for a batch. Raises UserError, with the batch that would fit, where it takes more memory than there is."""
    with waiting(f"compiling the step for {counted(rows, 'row')} of {row_tokens} tokens"):
        compiled = program.compile_within(rows, row_tokens, device.usable_bytes())
    need, there = compiled.host_bytes, device.host_bytes()
    if there is not None and need > there[1]:
        raise UserError(
            f"the step keeps {need / 1e9:.2f} GB in the host's memory, and the system has {there[1] / 1e9:.2f} GB of {there[0] / 1e9:.2f} "
            "available: end other processes, take fewer rows (data.batch_rows) or training.remat=full"
        )
    if streams := need - host.nbytes(program.frozen):
        say(f"saved streams: {streams / 1e9:.2f} GB in the host's pinned memory")


def read_data(
    experiment: Experiment, config: Architecture, model_folder: Path | None, own: Own = NOTHING_OWN
) -> tuple[Any, scoring.HeldOut | None, Dataset]:
    """Tokenizer (None for random tokens), the `eval:` section's problems and the data, as the run has them; told, with examples, and
    checked. By --dry-run too."""
    tokenizer = None
    if experiment.data.source is not None:
        tokenizer = load_tokenizer(experiment.tokenizer or str(model_folder), experiment.added_tokens)
        check_vocabulary(tokenizer, config.vocab_size)
    with waiting("reading the data"):
        pairs = experiment.preference is not None
        dataset = load_data(experiment.data, tokenizer, experiment.seed, config.vocab_size, pairs=pairs)
        asked = scoring.prepare(as_read(experiment, dataset), tokenizer, config.max_position_embeddings)
    if own.batches is not None:
        contents = {"data": own.batches.content()}
        dataset = Dataset(own.batches, None, dataset.tokenized, "batches given", config=dataset.config, contents=contents)
    else:
        say(*told(dataset, tokenizer))
    if asked is not None and asked.why_no_loss:
        say(f"no eval/loss: {asked.why_no_loss}")
    check_profile(experiment, dataset)
    say(*check_steps(experiment, dataset))
    return tokenizer, asked, dataset


def as_read(experiment: Experiment, dataset: Dataset) -> Experiment:
    """The experiment with what its data decide in the place of null: the template, and the day in it."""
    data = dataset.config
    return experiment if data is None else experiment.changed("data", template=data.template, template_date=data.template_date)
