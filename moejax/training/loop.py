"""A training run from config to adapter: what happens, in order."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from contextlib import ExitStack, suppress
from operator import itemgetter
from pathlib import Path
from textwrap import indent
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax import device, json_lines, processes, progress
from moejax.config import Experiment, dump
from moejax.data.batch import segment_lengths
from moejax.data.batching import Batches
from moejax.errors import UserError, out_of_memory
from moejax.estimator.units import counted
from moejax.hub import peft, save, weights
from moejax.hub.model import adapter_config, trained_on
from moejax.profiling.capture import Capture
from moejax.progress import duration, note, say, waiting
from moejax.runs import beside, folders
from moejax.runs.claim import claimed
from moejax.training import flops, prediction, room, step_profile, wandb_run
from moejax.training.checkpoint import Checkpoints, Position
from moejax.training.engaged import Engaged
from moejax.training.frozen import Frozen
from moejax.training.history import History
from moejax.training.metrics import MetricWriter, expert_load
from moejax.training.program import NOTHING_OWN, Own
from moejax.training.run_steps import Work, scored_steps, steps_in, total_steps, works
from moejax.training.scoring import Scoring
from moejax.training.start import Started, check_device, fit, start
from moejax.training.watch import Watch


class Pending(NamedTuple):
    """A step that was sent to the device and whose metrics have not been looked at."""

    step: int
    work: Work
    metrics: dict[str, jax.Array]


def run(experiment: Experiment, *, resume: bool, keep: bool = True, check_frozen: bool = False) -> int:
    """Train as the experiment says. Returns the exit code: 0, or 128 + the signal that stopped the run.

    keep: save checkpoints and the trained weights; without it the run leaves its measurements only. check_frozen: compare the weights
    that are not trained, after the run, with what they were before it. Raises UserError for every mistake of the user's.
    """
    trainer = trained(experiment, resume=resume, keep=keep, check_frozen=check_frozen)
    return 0 if trainer.stopped is None else 128 + trainer.stopped


def trained(
    experiment: Experiment, *, resume: bool, keep: bool = True, own: Own = NOTHING_OWN, check_frozen: bool = False
) -> Trainer:
    """`run`, with what a caller brings of its own. Returns what has trained: `history`, `folder`, `step`, `stopped`."""
    processes.check_started(experiment.mesh, "this run")
    with ExitStack() as stack:
        experiment = stack.enter_context(processes.joined(experiment))
        wandb_run.check(experiment)
        check_device(experiment, jax.local_devices()[0])
        folder = Path(experiment.runs_dir) / experiment.name
        if resume and not folder.is_dir():
            folders.prepare(experiment, resume=True)  # which says that there is no such run
        if processes.is_first():
            stack.enter_context(claimed(folder))
            stack.enter_context(folders.kept_if_begun(folder))
        trainer = Trainer(start(experiment, folder, resume=resume, own=own), resume=resume, keep=keep)
        frozen = Frozen(trainer.program.frozen) if check_frozen else None
        trainer.train()
        if frozen is not None:
            say(frozen.check(trainer.program.frozen))
        return trainer


class Trainer:
    """Holds a run's state between steps; `train` is the loop."""

    def __init__(self, started: Started, *, resume: bool, keep: bool):
        self.experiment, self.folder, self.program, self.dataset, self.tokenizer, asked = started
        experiment, folder, program, dataset = started[:4]
        self.config, self.keep, self.total_steps = program.config, keep, total_steps(experiment, dataset)
        self._met: set[tuple[int, ...]] = set()  # shapes of batches that were trained on
        # What a process writes that is not the first, nobody reads; checkpoints are written by all together.
        self._scratch = None if processes.is_first() else tempfile.TemporaryDirectory(prefix="moejax-")
        self.own_folder = folder if self._scratch is None else Path(self._scratch.name)
        c = experiment.checkpoint
        self.checkpoints = Checkpoints(folder / "checkpoints", c.keep, c.best and dataset.evaluation is not None)
        self.position, self.step = Position(0, 0), 0
        saved = resume and self.checkpoints.latest_step() is not None
        if saved:
            with waiting("reading the checkpoint"):
                program.state, self.position = self.checkpoints.newest(program.state)
            self.step = int(program.state.step)
            if self.step > self.total_steps:
                raise UserError(
                    f"{folder} has done {counted(self.step, 'step')}, and with the data and settings of today the whole run has "
                    f"{self.total_steps}: nothing is left to train. Start a new run under another name=…"
                )
        elif resume:
            say(f"{folder} was stopped before its first checkpoint: starting at step 0")
        self.last_saved = self.step if saved else None
        # The untrained model was evaluated before there was a checkpoint: the record stays, and is not written again. All processes look.
        records = json_lines.read(folder / "metrics.jsonl")[0] if resume and (folder / "metrics.jsonl").is_file() else []
        self._begun = any(r["step"] == 0 and "eval_loss" in r for r in records)
        logged = experiment if processes.is_first() else experiment.model_copy(update={"logging": ()})
        self.writer = MetricWriter(self.own_folder, logged, self.step if resume else None)
        if not resume:
            self.writer.write_text(0, "config", indent(dump(experiment), "    "))
        processes.wait_for_all("metrics of later steps are gone")
        self.scoring = None if asked is None else Scoring(asked, scored_steps(experiment, dataset), folder, self.own_folder)
        self.flop_count = flops.count(self.config, adapter_config(experiment), reference=experiment.preference is not None)
        self.peak_flops, self.peak_source = device.peak_flops(experiment.training.compute_dtype)
        self.engaged = Engaged(experiment, self.config)
        self.history = History()
        self.watch = Watch(folder, self.own_folder, experiment)
        p = experiment.profile
        self.capture = Capture(self.own_folder, p.start_step, p.steps, self.step) if p else Capture(self.own_folder, 1, 0)
        self.traced: list[dict[str, Any]] = []  # the whole records of the traced steps, and their batches' shapes
        self.compiled_in: set[int] = set()  # steps that waited for the compiler
        self.eval_loss: float | None = None
        self.stopped: int | None = None
        self._finished_at = time.perf_counter()

    def train(self) -> None:
        """Run to the last step, or to a signal (`stopped`). Saves, exports, prints the summary."""
        # Of several processes' signals all must hear: jax has listened for SIGTERM since they met.
        own = (signal.SIGINT, signal.SIGTERM) if processes.count() == 1 else (signal.SIGINT,)
        previous = {s: signal.signal(s, self._on_signal) for s in own}
        try:
            with progress.steps(self.total_steps, self.step) as self._show, out_of_memory(self._full):
                self._loop()
            self.writer.summarize(self._totals())
        finally:
            with ExitStack() as closing:  # each, whatever another cannot write
                closing.callback(self.writer.close)
                closing.callback(self.checkpoints.close)
                closing.callback(self.capture.close)
                for number, handler in previous.items():
                    signal.signal(number, handler)
        if self.stopped is not None:
            name = signal.Signals(self.stopped).name
            if self.keep:
                text = f"is saved in {self.folder}/checkpoints. To continue: moejax train {self.folder}/config.yaml --resume"
            else:
                text = f"was the last; what was measured is in {self.folder}"
            say(f"{name}: step {self.step} of {self.total_steps} {text}")
            self._report_profile()
            return
        if self.keep:
            with waiting("writing the trained weights"):
                self._export()
        self._summary()
        self._report_profile()

    def _full(self, why: str) -> str:
        """What to say where the device has no room for a step that compiled: something else lies there, or it lies in pieces."""
        compiled = self.program.compiled
        (rows, row_tokens), peak = max(((shape, one.peak_bytes) for shape, one in compiled.items()), key=itemgetter(1))
        wanted, free = room.read(why)
        free = device.free_bytes() if free is None else free
        less = "Lower data.batch_rows"
        if wanted is not None and free is not None and wanted > free:
            with suppress(UserError):
                fits = self.program.rows_within(rows, row_tokens, peak - (wanted - free))
                less = f"{free / 1e9:.2f} GB were free: data.batch_rows={fits} would fit" if fits else "Not even one row would fit"
        usable = device.usable_bytes()
        return (
            f"out of memory at step {self.step + 1}: {why}. The compiler had asked for {peak / 1e9:.2f} GB with {counted(rows, 'row')}"
            f"{'' if usable is None else f', {usable / 1e9:.2f} GB are usable'}; another process may hold memory. {less} (keep the batch "
            "by training.gradient_accumulation)"
        )

    def _loop(self) -> None:
        t, c = self.experiment.training, self.experiment.checkpoint
        pending: Pending | None = None
        if self.step == 0 and self.dataset.evaluation is not None and t.eval_every and not self._begun:
            self._evaluate()
        self._score()
        if self.stopped is not None:  # before anything goes beyond the step whose evaluation is missing
            return
        for work in works(self.experiment, self.dataset, self.position, self.step):
            self._compile(work)
            number = self.step + 1
            if pending is not None and self.capture.covers(number):
                self._finish(pending)  # nothing of an older step runs into the trace
            # Only the batch is sent: anything else that crossed from host to device here would be a mistake.
            with self.capture.step(number) as traced, jax.transfer_guard_host_to_device("disallow"):
                metrics = self.program.step(work.batch)
                if traced:
                    jax.block_until_ready((self.program.state, metrics))
            self.step, self.position = self.step + 1, work.after
            self.checkpoints.tidy()
            if processes.stop_agreed(self.step):
                self.stopped = signal.SIGTERM
            if pending is not None:
                self._finish(pending)
            pending = Pending(self.step, work, metrics)
            last = self.step == self.total_steps
            evaluate = self.dataset.evaluation is not None and (
                (last and self.keep) or bool(t.eval_every and self.step % t.eval_every == 0)
            )
            scored = self.scoring is not None and self.scoring.due(self.step)
            due = bool(c.every and self.step % c.every == 0) or (evaluate and c.best) or scored
            if evaluate or due or last or self.stopped is not None:
                self._finish(pending)  # a checkpoint must never hold a state whose loss was not finite
                pending = None
                eval_loss = self._evaluate() if evaluate else None
                if self.keep:
                    self.checkpoints.save(self.step, self.program.state, self.position, eval_loss)
                    self.last_saved = self.step
            self._score()
            if self.stopped is not None:
                return

    def _compile(self, work: Work) -> None:
        """The step for this batch's shape; its memory is checked before it is first run."""
        tokens = work.batch.tokens
        if tokens.shape in self._met:
            return
        fit(self.program, *tokens.shape[1:])
        device.return_freed()
        self._met.add(tokens.shape)
        self.compiled_in.add(self.step + 1)
        prediction.announce(
            self.experiment, self.config, self.own_folder, peak_bytes=self.program.peak_bytes,
            tokens=tokens.size, step=self.step + 1, last=self.total_steps, first=len(self._met) == 1,
        )  # fmt: skip
        self._finished_at = time.perf_counter()

    def _finish(self, pending: Pending) -> None:
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
        self.engaged.step(*pending.work.batch.tokens.shape)
        self._show(pending.step, record)
        self.watch.look(pending.step, record, pending.work.batch, self.last_saved)

    def _record(self, pending: Pending, values: dict[str, np.ndarray], seconds: float) -> dict[str, Any]:
        batch = pending.work.batch
        lengths = segment_lengths(batch.segment_ids)
        real = int((batch.segment_ids > 0).sum())
        model_flops = self.flop_count.step(real, lengths)
        record: dict[str, Any] = {"step": pending.step, "epoch": pending.work.after.epoch}
        record |= {name: float(v) for name, v in values.items() if v.ndim == 0}
        record |= {
            "step_seconds": seconds, "queries": len(lengths), "real_tokens": real, "padded_tokens": batch.tokens.size,
            "supervised_tokens": int(batch.loss_mask.sum()), "queries_per_second": len(lengths) / seconds,
            "tokens_per_second": real / seconds, "padded_tokens_per_second": batch.tokens.size / seconds,
            "model_flop_utilization": model_flops / seconds / (self.program.device_count * self.peak_flops),
        }  # fmt: skip
        return record | device.memory_bytes() | expert_load(
            values["expert_counts"], self.config.expert_layer_numbers, len(lengths)
        )

    def _means(self, batches: Batches) -> tuple[dict[str, float], float]:
        """Means over the supervised tokens, or pairs, by name: the loss and what else there is; and how many there are."""
        sums: dict[str, float] = {}
        weight = 0.0
        with waiting(f"evaluating after step {self.step}"):
            for batch in batches.iterate(0):
                part, count = self.program.evaluate(batch)
                sums, weight = {name: sums.get(name, 0.0) + value for name, value in part.items()}, weight + count
        return {name: value / max(weight, 1.0) for name, value in sums.items()}, weight

    def _evaluate(self) -> float:
        """Mean loss on the held-out part."""
        assert self.dataset.evaluation is not None
        means, weight = self._means(self.dataset.evaluation)
        self.eval_loss = means["loss"]
        self.writer.write(self.step, {f"eval_{name}": value for name, value in means.items()})
        if "rewards/accuracies" in means:
            likelier, larger = (100 * means[f"{kind}/accuracies"] for kind in ("logps", "rewards"))
            what = f"{weight:.0f} pairs: the chosen side is likelier in {likelier:.1f} %, and has the larger reward in {larger:.1f} %"
        else:
            what = f"{weight:.0f} tokens"
        say(f"step {self.step}: evaluation loss {self.eval_loss:.4f} over {what}")
        self._finished_at = time.perf_counter()
        return self.eval_loss

    def _score(self) -> None:
        """Count right answers, if that is due after this step. Its state is saved by now: a resumed run does not train it again."""
        if self.scoring is None or not self.scoring.due(self.step) or self.stopped is not None:
            return
        epoch = self.position.epoch
        part = self.position.step_in_epoch / steps_in(self.experiment, self.dataset, epoch)
        record = self.scoring.measure(self.step, epoch + part, self.program.model(), self._means, lambda: self.stopped is not None)
        if record is not None:
            self.checkpoints.wait()  # what is told of a step must not be there before its checkpoint is
            if self.experiment.checkpoint.best and self.scoring.best() == self.step:
                self.scoring.keep_best(self._export)
            self.writer.write(self.step, record)
            self.writer.write_text(self.step, "answers", self.scoring.samples)
            say(self.scoring.told(self.step))
        self._finished_at = time.perf_counter()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped is not None:  # the second time at once
            raise KeyboardInterrupt
        if processes.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.stopped = number
        # Not reported: the handler may have interrupted anyone who shows it.
        os.write(2, f"\n{signal.Signals(number).name}: this step is finished and saved; once more ends at once\n".encode())

    def _export(self, folder: Path | None = None) -> None:
        """adapter/ in PEFT's format, or model/ in the Hub's, in `folder` (default: the run's)."""
        folder, m = folder or self.folder, self.experiment.model
        model = self.program.written()
        if not processes.is_first():
            return
        if self.experiment.adapter is not None:
            peft.save_adapter(model, folder / "adapter", m.source or "", m.revision, base=trained_on(self.experiment))
            beside.carry_added_tokens(folder / "adapter", self.experiment, self.tokenizer)
            return
        save.save_weights(model, folder / "model")
        try:
            base = None if m.source is None else weights.resolve(m.source, m.revision)
        except UserError:  # it was there at the start: a trained model is not lost for what lay next to it
            base = None
        beside.carry(folder / "model", base, self.tokenizer, self.experiment.data.template or "mistral")

    def _report_profile(self) -> None:
        """step_profile.json and a short table, where steps were traced."""
        if self.experiment.profile is None:
            return
        # A step whose successor was compiled while it ran: its time is not known either.
        disturbed = self.compiled_in | {step - 1 for step in self.compiled_in}
        undisturbed = [r for r in self.history if r["step"] not in disturbed and not self.capture.disturbs(r["step"])]
        seconds = [r["step_seconds"] for r in undisturbed]
        step_profile.report(self.experiment, self.program, self.capture, self.traced, seconds, self.peak_flops)

    def _steady(self) -> list[dict[str, Any]]:
        """Records of steps that neither compiled nor were traced, as far as there are others."""
        return [r for r in self.history[1:] if not self.capture.disturbs(r["step"])] or list(self.history)

    def _totals(self) -> dict[str, float]:
        """What this process's steps were together."""
        steady = self._steady()
        if not steady:
            return {}
        seconds = sum(r["step_seconds"] for r in steady)
        return {
            "run/first_loss": self.history[0]["loss"], "run/last_loss": self.history[-1]["loss"],
            "run/queries_per_second": sum(r["queries"] for r in steady) / seconds,
            "run/tokens_per_second": sum(r["real_tokens"] for r in steady) / seconds, "run/step_seconds": seconds,
            "run/model_flop_utilization": float(np.median([r["model_flop_utilization"] for r in steady])),
            "run/compile_seconds": self.program.compile_seconds, "run/compiler_peak_bytes": self.program.peak_bytes,
        }  # fmt: skip

    def _summary(self) -> None:
        totals = self._totals()
        lines = [f"{counted(self.step, 'step')} done; everything is in {self.folder}"]
        if not totals:
            lines += ["nothing was left to train: an earlier process had done all steps"]
        else:
            several = "" if self.program.device_count == 1 else f"{self.program.device_count} x "
            memory_name, memory_value = next(iter(device.memory_bytes().items()))
            tried = f", {s:.1f} s before to choose what is auto" if (s := self.program.choosing_seconds) >= 0.1 else ""
            lines += [
                f"loss {totals['run/first_loss']:.4f} at step {self.history[0]['step']} -> {totals['run/last_loss']:.4f}"
                + ("" if self.eval_loss is None else f", evaluation {self.eval_loss:.4f}"),
                f"{totals['run/queries_per_second']:.2f} queries/s, {totals['run/tokens_per_second']:.0f} tokens/s, "
                f"{duration(totals['run/step_seconds'])} in steps, {totals['run/compile_seconds']:.1f} s compiling" + tried,
                f"model FLOP utilization {100 * totals['run/model_flop_utilization']:.1f} % of {several}{self.peak_flops / 1e12:.2f} "
                f"TFLOP/s ({self.peak_source})",
                f"memory: compiler peak {self.program.peak_bytes / 1e9:.2f} GB, {memory_name} {memory_value / 1e9:.2f} GB",
            ]
        lines += [*self.engaged.report(), *self.watch.conclude(), *([] if self.scoring is None else self.scoring.summary())]
        say(*lines)
        note(*self.engaged.warnings())
        if totals:
            say(*prediction.conclude(self.own_folder))
