"""Right answers counted while a run trains: after which steps, what came out, and which model was the best."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moejax.data.batching import Batches
from moejax.errors import UserError
from moejax.evaluation.evaluate import evaluate, write
from moejax.evaluation.recorded import Record, percent, recorded
from moejax.files import replace_text
from moejax.models.build import Model
from moejax.training.held_out import HeldOut

BEST = "best"  # the folder of the best model in a run's folder


class Stopped(Exception):
    """The run is to end: an evaluation is not finished for it; a resumed run makes it anew."""


class Scoring:
    """The evaluations of a run. `results`: step -> what metrics.jsonl says of it, those of an earlier process included.

    steps: after which of them to evaluate (0: the untrained model).
    """

    def __init__(self, held_out: HeldOut, steps: frozenset[int], folder: Path):
        self.held_out, self.steps, self.folder = held_out, steps, folder
        self.metric = f"eval/{held_out.settings.metric}"
        self.results = recorded(folder)

    def due(self, step: int) -> bool:
        return step in self.steps and step not in self.results

    def measure(
        self,
        step: int,
        epoch: float,
        model: Model,
        mean_loss: Callable[[Batches], tuple[float, float]],
        stopped: Callable[[], bool],
    ) -> Record | None:
        """Evaluate, keep the predictions in RUN/eval/step-N. None if `stopped()` came true meanwhile. Raises UserError without memory.

        mean_loss: (mean cross-entropy per supervised token, number of tokens).
        """

        def progress(done: int, count: int) -> None:
            if stopped():
                raise Stopped

        h = self.held_out
        try:
            loss = {} if h.batches is None else {"eval/loss": mean_loss(h.batches)[0]}
            result = evaluate(
                model, h.tokenizer, h.task, h.examples, template=h.template, ends=h.ends,
                max_new_tokens=h.max_new_tokens, rows=h.settings.rows, progress=progress,
            )  # fmt: skip
        except Stopped:
            return None
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"out of memory in the evaluation after step {step}: {str(error).splitlines()[0]}. Lower eval.rows "
                f"({h.settings.rows}) or eval.max_new_tokens ({h.max_new_tokens})"
            ) from error
        write(result, self.folder / "eval" / f"step-{step}")
        self.results[step] = {
            "eval/epoch": epoch,
            "eval/accuracy": result.accuracy,
            "eval/accuracy_low": result.low,
            "eval/accuracy_high": result.high,
            **loss,
            "eval/problems": result.n,
            "eval/seconds": result.seconds,
        }
        return self.results[step]

    def best(self) -> int | None:
        """The trained step with the best value, the first of equal ones; None before there is one."""
        trained = {step: r[self.metric] for step, r in sorted(self.results.items()) if step > 0}
        if not trained:
            return None
        return (max if self.metric == "eval/accuracy" else min)(trained, key=trained.__getitem__)

    def keep_best(self, export: Callable[[Path], Any]) -> None:
        """RUN/best: a folder such as a run's, with the model as it stands, and evaluation.json that says of which step it is."""
        step = self.best()
        assert step is not None
        folder = self.folder / BEST
        (folder / "evaluation.json").unlink(missing_ok=True)  # it must not speak of a model that is being replaced
        export(folder)
        (folder / "config.yaml").write_bytes((self.folder / "config.yaml").read_bytes())
        replace_text(folder / "evaluation.json", json.dumps({"step": step, "metric": self.metric, **self.results[step]}, indent=1) + "\n")

    def told(self, step: int) -> str:
        """One evaluation in words."""
        r, h = self.results[step], self.held_out
        loss = f", loss {r['eval/loss']:.4f}" if "eval/loss" in r else ""
        return (
            f"step {step}, epoch {r['eval/epoch']:.4g}: {h.task.name} {percent(r)} of {r['eval/problems']:.0f} problems{loss}; "
            f"{r['eval/seconds']:.1f} s"
        )

    def summary(self) -> list[str]:
        """The best model of the run beside the untrained one."""
        step = self.best()
        if step is None:
            return []
        untrained = f"; untrained {self._value(0)}" if 0 in self.results else ""
        kept = f"; that model is in {self.folder / BEST}" if (self.folder / BEST).is_dir() else ""
        return [f"best {self.metric}: {self._value(step)} after step {step}{untrained}{kept}"]

    def _value(self, step: int) -> str:
        r = self.results[step]
        return percent(r) if self.metric == "eval/accuracy" else f"{r[self.metric]:.4f}"
