"""What follows from the measured trials: the coefficients of equations 1 and 2 and of our own model, and what a training run would cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax import gpus
from moejax.errors import UserError
from moejax.estimator import coefficients, equations, fitting, prices
from moejax.estimator.fitting import Fitted, Run
from moejax.study.characterize import plan, result
from moejax.study.characterize.plan import Task
from moejax.study.characterize.result import Result
from moejax.study.characterize.study import Setting, Study
from moejax.study.report import results
from moejax.study.report.results import Row

FIGURE_13_GB = (24.0, 40.0, 48.0, 80.0, 100.0, 120.0)


@dataclass(frozen=True)
class Measured:
    """A finished trial's task and facts."""

    task: Task
    facts: dict[str, Any]

    def run(self, device: str, tokens: float | None = None) -> Run:
        """As the estimator's fits take it; tokens: of the program whose peak is meant, where that is not the mean."""
        s, f = self.task.setting, self.facts
        a = s.architecture
        return Run(
            self.task.name, "jax", device, s.model, None, s.method, a.num_experts, a.experts_per_token, float(f["queries"]),
            float(tokens or f["tokens"]), float(f["seconds"]), f["peak_bytes"], f["argument_bytes"], s.experiment.training.compute_dtype,
            s.experiment.training.remat,
        )  # fmt: skip


def read(folder: Path, study: Study, model: str) -> list[Measured]:
    """The finished throughput and length trials of a model."""
    found = []
    for task in plan.tasks(study):
        if task.kind in ("throughput", "length") and task.setting.model == model:
            left = result.read(result.path_of(folder, task.name))
            if left and left.status == "done" and left.facts:
                found.append(Measured(task, left.facts))
    return found


def run(task: Task, study: Study, found: results.Study, folder: Path) -> Result:
    """A fit's or a cost's rows. Raises UserError where nothing was measured that they could come from."""
    measured = read(folder, study, task.setting.model)
    if not any(m.task.kind == "throughput" for m in measured):
        raise UserError(f"no throughput trial of {task.setting.model} came to an end: nothing to compute with")
    return fit(task, measured, found) if task.kind == "fit" else cost(task, study, measured, found)


def _row(task: Task, s: Setting, experiment: str, metric: str, value: float, unit: str, **columns: Any) -> Row:
    return Row.of(task.name, experiment, s.model, s.method, metric, value, unit, **({"data": s.data} | columns))


_UNITS = {
    "c0": "tokens/GB", "c1": "share", "model_gb": "GB", "rmse_gb": "GB", "c2": "queries/s", "c3": "1", "c4": "queries/s",
    "rmse": "queries/s", "t0_seconds": "s", "token_seconds": "s", "expert_token_seconds": "s", "mean_error": "share", "points": "points",
}  # fmt: skip


def _fitted(task: Task, s: Setting, experiment: str, values: dict[str, Any], **columns: Any) -> list[Row]:
    """A row for each of a fit's values that is known."""
    return [_row(task, s, experiment, name, v, unit, **columns) for name, unit in _UNITS.items() if (v := values.get(name)) is not None]


def fit(task: Task, measured: list[Measured], found: results.Study) -> Result:
    """Equation 1 and 2 by data set over the padded trials, as the study fits them; our model over every throughput trial."""
    out, remarks = Result(), []
    device = found.environment.device
    points = [m for m in measured if m.task.kind == "throughput"]
    try:
        ours = fitting.fit_runs([m.run(device) for m in points])[0]
        rates, errors = np.array([r.queries / r.seconds for r in ours.runs]), np.array(ours.errors)
        rmse = float(np.sqrt(np.mean((rates / (1 + errors) - rates) ** 2)))
        values = ours.entry.named | {"rmse": rmse, "mean_error": float(np.mean(np.abs(errors))), "points": len(points)}
        out.rows += _fitted(task, task.setting, "fit_throughput", values, data=None, scope="moejax")
    except UserError as error:
        remarks.append(f"our model: {error}")
    for data in dict.fromkeys(m.task.setting.data for m in points):
        padded = [m for m in points if m.task.setting.data == data and m.task.batching == "pad_longest"]
        try:
            second = fitting.fit_runs([m.run(device) for m in padded])[0]
            first = fitting.fit_runs([m.run(device, m.facts["peak_tokens"]) for m in padded])[0]
        except UserError as error:
            remarks.append(f"equations 1 and 2, {data}: {error}")
            continue
        for form, e in (second.equation_2 or {}).items():
            values = e | {"rmse": e["rmse_queries_per_second"], "points": len(padded)}
            out.rows += _fitted(task, padded[0].task.setting, "fit_throughput", values, scope=f"equation 2 ({form})")
        out.rows += _equation_1(task, padded, first, found)
    out.message = "; ".join(remarks) or None
    if not out.rows:
        raise UserError(out.message or "nothing could be fitted")
    return out


def _equation_1(task: Task, points: list[Measured], f: Fitted, found: results.Study) -> list[Row]:
    e, s = f.equation_1, points[0].task.setting
    if e is None:
        return []
    rows = _fitted(task, s, "fit_batch", e)
    here = (found.memory_limit.bytes or 0) / 1e9
    sizes = {f"{gb:g} GB": gb for gb in ((here, *FIGURE_13_GB) if here > min(FIGURE_13_GB) / 2 else (here, 2 * here, 4 * here))}
    for m in {m.task.setting.key: m for m in points}.values():
        own = m.task.setting
        share = own.architecture.experts_per_token / own.architecture.num_experts
        for scope, gb in sizes.items():  # the limit may be one of the figure's
            if gb > 0:
                batch = equations.max_batch(gb, e["model_gb"], own.longest, share, e["c0"], e["c1"] or 0.0)
                rows.append(_row(
                    task, own, "fit_batch", "predicted_batch", batch, "queries", scope=scope, routing=own.routing,
                    seq_len=own.longest, batching="fixed",
                ))  # fmt: skip
    return rows


def cost(task: Task, study: Study, measured: list[Measured], found: results.Study) -> Result:
    """Hours and dollars of the config's whole run: on this device at its fastest measured batch, on others by carrying our model over."""
    out, remarks = Result(), []
    device = found.environment.device
    own = gpus.of_device_kind(device) if found.environment.platform == "gpu" else None
    points = [m for m in measured if m.task.kind == "throughput"]
    entry = None
    if own is None:
        remarks.append(f"{device} is in no table of GPUs: it has no price, and nothing is carried over from it")
    else:
        try:
            entry = fitting.fit_runs([m.run(device) for m in points])[0].entry
        except UserError as error:
            remarks.append(f"nothing is carried over to other GPUs: {error}")
    told: dict[str, str] = {}
    for s in (s for s in study.settings if s.model == task.setting.model):
        mine = [m for m in points if m.task.setting.key == s.key]
        if not mine:
            continue
        best = max(mine, key=lambda m: m.facts["queries"] / m.facts["seconds"])
        here, measured_batch = own.name if own else device, best.facts["queries"]
        out.rows += _cost_rows(task, s, best, here, measured_batch, measured_batch / best.facts["seconds"], told, True)
        for gpu in gpus.GPUS.values() if entry else ():
            batch = s.fits_on(gpu)
            if gpu.name == here or not batch or _price(gpu.name) is None:
                continue
            assert entry is not None
            law = coefficients.choose([entry], entry.model, entry.method, gpu, gpus.GPUS)
            share = s.architecture.experts_per_token / s.architecture.num_experts
            seconds = law.seconds(batch * best.facts["tokens"] / best.facts["queries"], share)
            out.rows += _cost_rows(task, s, best, gpu.name, batch, batch / seconds, told, False)
    out.message, out.facts = "; ".join(remarks) or None, {"prices": told}
    return out


def _price(gpu: str) -> prices.Price | None:
    """The cheapest on demand: dated, or, where no seller of these has it, the study's."""
    return prices.cheapest(prices.SETS["2026"], gpu) or prices.cheapest(prices.SETS["study"], gpu)


def _cost_rows(task: Task, s: Setting, best: Measured, gpu: str, batch: float, rate: float, told: dict[str, str],
               measured: bool) -> list[Row]:  # fmt: skip
    hours, price = s.run_queries / rate / 3600, _price(gpu)
    batch = int(batch) if float(batch).is_integer() else batch
    values: list[tuple[str, float, str]] = [
        ("batch", batch, "queries"), ("queries_per_second", rate, "queries/s"), ("queries", s.run_queries, "queries"),
        ("hours", hours, "h"), ("measured", int(measured), "1 or 0"),
    ]  # fmt: skip
    if price is not None:
        told[gpu] = price.told.partition(", ")[2]
        values += [("usd_per_hour", price.usd_per_hour, "USD/h"), ("usd", hours * price.usd_per_hour, "USD")]
    columns: dict[str, Any] = {"routing": s.routing, "batching": best.task.batching, "seq_len": best.task.row_tokens, "batch": batch}
    return [_row(task, s, "cost", *value, scope=gpu, **columns) for value in values]
