"""Which cards of the table hold a config's step, by the closed form: none is named that a run would refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moejax import gpus
from moejax.estimator import closed_form, memory
from moejax.estimator.units import counted

if TYPE_CHECKING:
    from moejax.config import Experiment
    from moejax.models.config import Architecture


def lines(experiment: Experiment, config: Architecture) -> list[str]:
    """What fits with the config's own rows, what the closed form cannot call, what does not fit, what lacks bf16. A remat policy between
    `none` and `full` counts as `none`, which holds most; `auto` as `full`, which it comes down to."""
    t, rows, row_tokens = experiment.training, experiment.data.batch_rows, experiment.data.longest_row
    policy = {"auto": "full", "dots": "none"}.get(t.remat, t.remat)
    settled = experiment.model_copy(update={"training": t.model_copy(update={"remat": policy})})
    found: dict[str, list[str]] = {"fits": [], "close": [], "small": [], "without": []}
    for gpu in gpus.GPUS.values():
        platform, device = closed_form.platform_of(gpu), closed_form.device_of(gpu)
        peak = closed_form.breakdown(settled, config, rows=rows, row_tokens=row_tokens, platform=platform, device=device).total
        sure, possible = memory.by_closed_form(memory.usable_bytes(gpu, experiment.device.memory_fraction))
        kind = "without" if t.asks_bf16 and not gpu.bf16 else "fits" if peak <= sure else "close" if peak <= possible else "small"
        found[kind].append(gpu.name)
    share = f"{experiment.device.memory_fraction:g} of the memory"
    heads = {
        "fits": f"fits ({counted(rows, 'row')} of {row_tokens:,} tokens, by the closed form, in {share})",
        "close": memory.COMPILE, "small": "does not fit", "without": "no bf16, which the training section asks for",
    }  # fmt: skip
    return [f"{head}: {', '.join(found[kind]) or 'none'}" for kind, head in heads.items() if found[kind] or kind in ("fits", "small")]
