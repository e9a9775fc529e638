"""A training run from config to adapter: what happens, in order."""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from moejax import device
from moejax.config import Experiment
from moejax.data.batch import Batch, segment_lengths
from moejax.data.batching import Batches
from moejax.data.pipeline import Dataset
from moejax.errors import UserError
from moejax.estimator.units import counted
from moejax.hub import peft, save, weights
from moejax.hub.model import adapter_config, architecture, continue_adapter, create_model, model_arguments
from moejax.hub.quantized_cache import Content
from moejax.models.build import Model, build
from moejax.profiling.capture import Capture
from moejax.progress import waiting
from moejax.runs import beside, folders, pinning
from moejax.runs.claim import claimed
from moejax.terminal import Console
from moejax.training import device_check, experts, flops, held_out, low_precision, prediction, remat, step_profile
from moejax.training.checkpoint import Checkpoints, Position
from moejax.training.identity import Identity
from moejax.training.inputs import read_data
from moejax.training.metrics import Display, MetricWriter, duration, expert_load
from moejax.training.optimizer import make_optimizer, make_schedule
from moejax.training.programs import Programs, largest_shape
from moejax.training.run_steps import Work, scored_steps, steps_in, total_steps, works
from moejax.training.scoring import Scoring
from moejax.training.state import initial_state, objective, split
from moejax.training.step import Objective, TrainState, make_eval_step


class Pending(NamedTuple):
    """A step that was sent to the device and whose metrics have not been looked at."""

    step: int
    work: Work
    metrics: dict[str, jax.Array]


def run(experiment: Experiment, *, resume: bool, keep: bool = True) -> int:
    """Train as the experiment says. Returns the exit code: 0, or 128 + the signal that stopped the run.

    keep: save checkpoints and the trained weights; without it the run leaves its measurements only. Raises UserError for every
    mistake of the user's.
    """
    console = Console()
    device_check.check(experiment, jax.local_devices()[0])
    folder = Path(experiment.runs_dir) / experiment.name
    if resume and not folder.is_dir():
        folders.prepare(experiment, resume=True)  # which says that there is no such run
    with claimed(folder), folders.kept_if_begun(folder):
        return _run(experiment, folder, console, resume=resume, keep=keep)


def _run(experiment: Experiment, folder: Path, console: Console, *, resume: bool, keep: bool) -> int:
    """`run`, in a folder that is this process's alone. Cheap things first: what is wrong costs seconds, and no download of weights."""

    def say(lines: list[str]) -> None:
        for line in lines:
            console.print(line, soft_wrap=True)

    if resume:
        experiment = pinning.adopted(remat.of_run(experiment))
    begun = folders.prepare(experiment, resume=resume)
    source = experiment.model.source
    model_folder = None if source is None else weights.resolve(source, experiment.model.revision, weights=False)
    experiment = pinning.pinned(experiment, model_folder)
    config = architecture(experiment, model_folder)
    experiment = experiment.with_defaults(config)
    console.print(experts.announce(experiment, config), soft_wrap=True)
    abstract = build(config, **model_arguments(experiment))
    if source is not None and model_folder is not None and Path(source).is_dir():
        weights.check_files(abstract, model_folder)
    continue_adapter(experiment, abstract, experiment.model.source)  # one that does not fit is told before data and weights are read
    tokenizer, asked, dataset = read_data(experiment, config, model_folder, console)
    identity = Identity(experiment, begun if resume else experiment.made_of, resume=resume)
    say(identity.of_data(tokenizer, asked, dataset, model_folder))
    steps = total_steps(experiment, dataset)
    experiment = remat.resolve(experiment, config, steps, console)
    programs = Programs(experiment, config, steps, console)
    programs.get(largest_shape(experiment, dataset))
    if model_folder is not None:
        with waiting(console, f"weights of {experiment.model.source}"):
            model_folder = weights.resolve(str(experiment.model.source), experiment.model.revision)
        say(identity.of_files(model_folder))
    content = Content()
    with waiting(console, "loading the model"):
        model = create_model(experiment, config, model_folder, content)
        continue_adapter(experiment, model, experiment.model.source)
    if model_folder is not None:
        say(weights.report(model))
    say(identity.of_weights(content.value))
    low_precision.warn(experiment, console, model)
    experiment = identity.written(experiment)
    trainer = Trainer(
        experiment, model, dataset, folder, console, programs, resume=resume, keep=keep, asked=asked, tokenizer=tokenizer
    )
    return trainer.train()


class Trainer:
    """Holds a run's state between steps; `train` is the loop."""

    def __init__(
        self,
        experiment: Experiment,
        model: Model,
        dataset: Dataset,
        folder: Path,
        console: Console,
        programs: Programs,
        *,
        resume: bool,
        keep: bool = True,
        asked: held_out.HeldOut | None = None,
        tokenizer: Any = None,
    ):
        self.experiment, self.dataset, self.folder, self.console, self.keep = experiment, dataset, folder, console, keep
        self.tokenizer, self.programs = tokenizer, programs
        self.config = model.config
        t = experiment.training
        graphdef, trainable, self.frozen = split(model, full=experiment.adapter is None)
        self.objective: Objective = objective(experiment, graphdef)
        self.total_steps = total_steps(experiment, dataset)
        schedule = make_schedule(t, self.total_steps)
        optimizer = make_optimizer(t, schedule)
        self._met: set[tuple[int, ...]] = set()  # shapes of batches that were trained on
        self._eval_step = jax.jit(make_eval_step(self.objective))
        self.state: TrainState = initial_state(trainable, optimizer)
        c = experiment.checkpoint
        self.checkpoints = Checkpoints(folder / "checkpoints", c.keep, c.best and dataset.evaluation is not None)
        self.position, self.step = Position(0, 0), 0
        saved = resume and self.checkpoints.latest_step() is not None
        if saved:
            with waiting(console, "reading the checkpoint"):
                self.state, self.position = self.checkpoints.newest(self.state, self._say)
            self.step = int(self.state.step)
            if self.step > self.total_steps:
                raise UserError(
                    f"{folder} has done {counted(self.step, 'step')}, and with the data and settings of today the whole run has "
                    f"{self.total_steps}: nothing is left to train. Start a new run under another name=…"
                )
        elif resume:
            console.print(
                f"{folder} was stopped before its first checkpoint: starting at step 0", soft_wrap=True
            )
        self.start_step, self.last_saved = self.step, self.step if saved else None
        self.writer = MetricWriter(folder, self.step if resume else None, self._say)
        self.scoring = None if asked is None else Scoring(asked, scored_steps(experiment, dataset), folder)
        self.flop_count = flops.count(self.config, adapter_config(experiment))
        self.peak_flops, self.peak_source = device.peak_flops(t.compute_dtype)
        self.history: list[dict[str, Any]] = []
        p = experiment.profile
        self.capture = Capture(folder, p.start_step, p.steps, self.step) if p else Capture(folder, 1, 0)
        self.traced: list[dict[str, Any]] = []  # the whole records of the traced steps, and their batches' shapes
        self.compiled_in: set[int] = set()  # steps that waited for the compiler
        self.eval_loss: float | None = None
        self._stop: int | None = None
        self._finished_at = time.perf_counter()

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def train(self) -> int:
        """Run to the last step, or to a signal. Saves, exports, prints the summary."""
        display = Display(self.total_steps, self.step, self.console)
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._loop(display)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"out of memory at step {self.step + 1}: {str(error).splitlines()[0]}. The compiler had asked for "
                f"{self.programs.peak_bytes / 1e9:.2f} GB; another process may hold memory. Lower data.batch_rows and raise "
                "training.gradient_accumulation"
            ) from error
        finally:
            with ExitStack() as closing:  # each, whatever another cannot write
                closing.callback(self.writer.close)
                closing.callback(self.checkpoints.close)
                closing.callback(display.close)
                closing.callback(self.capture.close)
                for number, handler in previous.items():
                    signal.signal(number, handler)
        if self._stop is not None:
            name = signal.Signals(self._stop).name
            if self.keep:
                text = f"is saved in {self.folder}/checkpoints. To continue: moejax train {self.folder}/config.yaml --resume"
            else:
                text = f"was the last; what was measured is in {self.folder}"
            self.console.print(f"{name}: step {self.step} of {self.total_steps} {text}", soft_wrap=True)
            self._report_profile()
            return 128 + self._stop
        if self.keep:
            with waiting(self.console, "writing the trained weights"):
                self._export()
        self._summary()
        self._report_profile()
        return 0

    def _loop(self, display: Display) -> None:
        t, c = self.experiment.training, self.experiment.checkpoint
        pending: Pending | None = None
        if self.step == 0 and self.dataset.evaluation is not None and t.eval_every:
            self._evaluate(display)
        self._score(display)
        if self._stop is not None:  # before anything goes beyond the step whose evaluation is missing
            return
        for work in works(self.experiment, self.dataset, self.position, self.step):
            step_function = self._compile(work.batch)
            number = self.step + 1
            if pending is not None and self.capture.covers(number):
                self._finish(pending, display)  # nothing of an older step runs into the trace
            # Only the batch is sent: anything else that crossed from host to device here would be a mistake.
            with self.capture.step(number) as traced, jax.transfer_guard_host_to_device("disallow"):
                batch = jax.device_put(work.batch)
                self.state, metrics = step_function(self.state, self.frozen, batch)
                if traced:
                    jax.block_until_ready((self.state, metrics))
            self.step, self.position = self.step + 1, work.after
            if pending is not None:
                self._finish(pending, display)
            pending = Pending(self.step, work, metrics)
            last = self.step == self.total_steps
            evaluate = self.dataset.evaluation is not None and (
                (last and self.keep) or bool(t.eval_every and self.step % t.eval_every == 0)
            )
            scored = self.scoring is not None and self.scoring.due(self.step)
            due = bool(c.every and self.step % c.every == 0) or (evaluate and c.best) or scored
            if evaluate or due or last or self._stop is not None:
                self._finish(pending, display)  # a checkpoint must never hold a state whose loss was not finite
                pending = None
                eval_loss = self._evaluate(display) if evaluate else None
                if self.keep:
                    self.checkpoints.save(self.step, self.state, self.position, eval_loss)
                    self.last_saved = self.step
            self._score(display)
            if self._stop is not None:
                return

    def _compile(self, batch: Batch) -> Any:
        """The step compiled for this batch's shape; its memory is checked before it is first run."""
        shape = batch.tokens.shape
        program = self.programs.get(shape)
        if shape not in self._met:
            self._met.add(shape)
            self.compiled_in.add(self.step + 1)
            prediction.announce(
                self.experiment, self.config, self.folder, self.console, peak_bytes=self.programs.peak_bytes,
                tokens=batch.tokens.size, step=self.step + 1, last=self.total_steps, first=len(self._met) == 1,
            )  # fmt: skip
            self._finished_at = time.perf_counter()
        return program

    def _finish(self, pending: Pending, display: Display) -> None:
        """Wait for a step's metrics, write them, stop if they are not finite. A step already finished is left alone."""
        if self.history and self.history[-1]["step"] >= pending.step:
            return
        values = jax.device_get(pending.metrics)
        now = time.perf_counter()
        seconds, self._finished_at = now - self._finished_at, now
        record = self._record(pending, values, seconds)
        self.writer.write(pending.step, {k: v for k, v in record.items() if k != "step"})
        self.history.append({k: v for k, v in record.items() if not isinstance(v, list)})
        if self.capture.covers(pending.step):
            self.traced.append(record | {"shape": pending.work.batch.tokens.shape})
        display.update(pending.step, record)
        if not math.isfinite(record["loss"]) or not math.isfinite(record["grad_norm"]):
            saved = (
                "no checkpoint was saved yet"
                if self.last_saved is None
                else f"the last good checkpoint is step {self.last_saved}"
            )
            raise UserError(
                f"step {pending.step}: loss = {record['loss']}, gradient norm = {record['grad_norm']}: not finite. The run stops; "
                f"{saved} in {self.folder}/checkpoints. Try a lower training.learning_rate, or compute_dtype=float32."
            )

    def _record(self, pending: Pending, values: dict[str, np.ndarray], seconds: float) -> dict[str, Any]:
        batch = pending.work.batch
        lengths = segment_lengths(batch.segment_ids)
        real = int((batch.segment_ids > 0).sum())
        model_flops = self.flop_count.step(real, flops.visible_pairs(lengths))
        record: dict[str, Any] = {"step": pending.step, "epoch": pending.work.after.epoch}
        record |= {name: float(v) for name, v in values.items() if v.ndim == 0}
        record |= {
            "step_seconds": seconds,
            "queries": len(lengths),
            "real_tokens": real,
            "padded_tokens": batch.tokens.size,
            "supervised_tokens": int(batch.loss_mask.sum()),
            "queries_per_second": len(lengths) / seconds,
            "tokens_per_second": real / seconds,
            "padded_tokens_per_second": batch.tokens.size / seconds,
            "model_flop_utilization": model_flops / seconds / self.peak_flops,
        }
        return record | device.memory_bytes() | expert_load(values["expert_counts"], len(lengths))

    def _mean_loss(self, batches: Batches) -> tuple[float, float]:
        """Mean loss per supervised token, and how many there are."""
        loss = tokens = 0.0
        with waiting(self.console, f"evaluating after step {self.step}"):
            for batch in batches.iterate(0):
                part, count = self._eval_step(self.state.trainable, self.frozen, jax.device_put(batch))
                loss, tokens = loss + float(part), tokens + float(count)
        return loss / max(tokens, 1.0), tokens

    def _evaluate(self, display: Display) -> float:
        """Mean loss on the held-out part."""
        assert self.dataset.evaluation is not None
        self.eval_loss, tokens = self._mean_loss(self.dataset.evaluation)
        self.writer.write(self.step, {"eval_loss": self.eval_loss})
        display.note(f"step {self.step}: evaluation loss {self.eval_loss:.4f} over {tokens:.0f} tokens")
        self._finished_at = time.perf_counter()
        return self.eval_loss

    def _score(self, display: Display) -> None:
        """Count right answers, if that is due after this step. Its state is saved by now: a resumed run does not train it again."""
        if self.scoring is None or not self.scoring.due(self.step) or self._stop is not None:
            return
        epoch = self.position.epoch
        part = self.position.step_in_epoch / steps_in(self.experiment, self.dataset, epoch)
        record = self.scoring.measure(self.step, epoch + part, self.model(), self._mean_loss, lambda: self._stop is not None)
        if record is not None:
            self.checkpoints.wait()  # what is told of a step must not be there before its checkpoint is
            if self.experiment.checkpoint.best and self.scoring.best() == self.step:
                self.scoring.keep_best(self._export)
            self.writer.write(self.step, record)
            display.note(self.scoring.told(self.step))
        self._finished_at = time.perf_counter()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop is not None:  # the second time at once
            raise KeyboardInterrupt
        self._stop = number
        # Not through the console: the handler may have interrupted it.
        os.write(2, f"\n{signal.Signals(number).name}: this step is finished and saved; once more ends at once\n".encode())

    def model(self) -> Model:
        """The model as it stands."""
        return nnx.merge(self.objective.graphdef, self.state.trainable, self.frozen)

    def _export(self, folder: Path | None = None) -> None:
        """adapter/ in PEFT's format, or model/ in the Hub's, in `folder` (default: the run's)."""
        folder, m = folder or self.folder, self.experiment.model
        if self.experiment.adapter is not None:
            peft.save_adapter(self.model(), folder / "adapter", m.source or "", m.revision)
            return
        save.save_weights(self.model(), folder / "model")
        try:
            base = None if m.source is None else weights.resolve(m.source, m.revision)
        except UserError:  # it was there at the start: a trained model is not lost for what lay beside it
            base = None
        beside.carry(folder / "model", base, self.tokenizer, self.experiment.data.template)

    def _report_profile(self) -> None:
        """step_profile.json and a short table, where steps were traced."""
        if self.experiment.profile is None:
            return
        # A step whose successor was compiled while it ran: its time is not known either.
        disturbed = self.compiled_in | {step - 1 for step in self.compiled_in}
        step_profile.report(
            step_profile.Measured(
                experiment=self.experiment,
                model=self.model(),
                folder=self.folder,
                capture=self.capture,
                traced=self.traced,
                step_seconds=[
                    r["step_seconds"]
                    for r in self.history
                    if r["step"] not in disturbed and not self.capture.disturbs(r["step"])
                ],
                programs=[self.programs.get(shape) for shape in {r["shape"] for r in self.traced}],
                compile_seconds=self.programs.seconds,
                peak_flops=self.peak_flops,
            ),
            self.console,
        )

    def _summary(self) -> None:
        steady = [r for r in self.history[1:] if not self.capture.disturbs(r["step"])] or self.history
        lines = [f"{counted(self.step, 'step')} done; everything is in {self.folder}"]
        if not self.history:
            lines += ["nothing was left to train: an earlier process had done all steps"]
        if steady:
            seconds = sum(r["step_seconds"] for r in steady)
            rate = {k: sum(r[k] for r in steady) / seconds for k in ("queries", "real_tokens")}
            utilization = float(np.median([r["model_flop_utilization"] for r in steady]))
            memory_name, memory_value = next(iter(device.memory_bytes().items()))
            lines += [
                f"loss {self.history[0]['loss']:.4f} at step {self.history[0]['step']} -> {self.history[-1]['loss']:.4f}"
                + ("" if self.eval_loss is None else f", evaluation {self.eval_loss:.4f}"),
                f"{rate['queries']:.2f} queries/s, {rate['real_tokens']:.0f} tokens/s, {duration(seconds)} in steps, "
                f"{self.programs.seconds:.1f} s compiling",
                f"model FLOP utilization {100 * utilization:.1f} % of {self.peak_flops / 1e12:.2f} TFLOP/s ({self.peak_source})",
                f"memory: compiler peak {self.programs.peak_bytes / 1e9:.2f} GB, {memory_name} {memory_value / 1e9:.2f} GB",
            ]
        lines += [] if self.scoring is None else self.scoring.summary()
        self.console.print("\n".join(lines), soft_wrap=True)
        if steady:
            prediction.conclude(self.folder, self.console)
