"""What both sides agree on: the handed-over experiment, what PyTorch's side can express of it, and the learning rate. No torch here.

`benchmarks/handover.py` writes the folder; everything here needs Python's library alone, so both environments and the tests read it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

FORMAT = 1
STACKS = {
    "study": "transformers 4 with PEFT 0.18: an adapter per expert, bitsandbytes' NF4 (the study's)",
    "today": "transformers 5 with PEFT 0.21: stacked experts, target_parameters",
    "plain": "BlackMamba in plain PyTorch",
}
MAKE = {"study": "reference4", "today": "reference5", "plain": "reference4"}
"""The make target that builds a stack's environment."""


class CannotRun(Exception):
    """Something that this side cannot express or do; the message is for the user."""


def read(folder: Path) -> dict[str, Any]:
    """The folder's experiment.json."""
    path = folder / "experiment.json"
    if not path.is_file():
        raise CannotRun(f"{path} does not exist: benchmarks/handover.py writes such a folder")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise CannotRun(
            f"{path}: format = {content.get('format')!r}, expected {FORMAT}: write it again with benchmarks/handover.py"
        )
    return content


def check(content: dict[str, Any], stack: str) -> None:
    """Raises CannotRun naming the first field that this stack cannot express, and why."""
    e, kind = content["experiment"], content["kind"]
    t, adapter, quantized = e["training"], e["adapter"], e["quantization"]["format"] != "none"
    problems = {
        f"model is a {kind}": stack not in {"mixtral": ("study", "today"), "blackmamba": ("plain",)}.get(kind, ()),
        f"training.optimizer = {t['optimizer']}": t["optimizer"] != "adamw",
        f"model.aux_loss_coef = {e['model']['aux_loss_coef']}": bool(e["model"]["aux_loss_coef"]),
        f"adapter.dropout = {adapter and adapter['dropout']}": bool(adapter and adapter["dropout"]),
        "quantization.format = nf4": quantized and stack == "today",
        f"training.param_dtype = {t['param_dtype']}": adapter is None
        and stack != "plain"
        and t["param_dtype"] != t["compute_dtype"],
        f"training.weight_decay_on = {t['weight_decay_on']}": adapter is None
        and bool(t["weight_decay"])
        and t["weight_decay_on"] != "all",
        "training.param_dtype = bfloat16_stochastic": t["param_dtype"] == "bfloat16_stochastic",
        f"training.remat = {t['remat']}": t["remat"] not in ("none", "full"),
        "adapter.share": stack == "study" and bool(adapter and adapter["share"]),
        "adapter.targets": stack == "today" and bool(adapter) and not {"w1", "w2", "w3"} <= set(adapter["targets"]),
    }
    reasons = {
        "model is a ": f"the stack {stack!r} is for another ({STACKS[stack]})",
        "training.optimizer": "AdamW alone has the same rule on both sides",
        "model.aux_loss_coef": "the runner adds no load-balancing loss",
        "adapter.dropout": "two frameworks cannot draw the same masks",
        "quantization.format": "bitsandbytes stores linear layers in 4 bits, and transformers 5 keeps experts as stacked parameters",
        "training.param_dtype = bfloat16_stochastic": "it rounds to the nearest number: set bfloat16, or float32",
        "training.param_dtype": "transformers holds one copy of a Mixtral's weights: it must be equal to training.compute_dtype",
        "training.weight_decay_on": "its AdamW decays whatever it trains: set training.weight_decay_on=all",
        "training.remat": "its layers are recomputed whole or not at all: full or none, the same for both sides",
        "adapter.share": "PEFT 0.18 trains an A for each matrix: leave it out, or compare with the stack 'today'",
        "adapter.targets": "transformers 5 holds w1 and w3 in one parameter: w1, w2 and w3 are adapted together or not at all",
    }
    for what, wrong in problems.items():
        if wrong:
            why = next(reason for name, reason in reasons.items() if what.startswith(name))
            raise CannotRun(f"{what}: PyTorch's side cannot express it: {why}")


def learning_rate(training: dict[str, Any], steps: int, done: int) -> float:
    """Of the step after `done` steps: optax's schedules as `moejax.training.optimizer` builds them. Linear warm-up from zero, then …"""
    peak, ratio, warm = training["learning_rate"], training["min_learning_rate_ratio"], training["warmup_steps"]
    if done < warm:
        return float(peak * done / warm)
    part = min(1.0, (done - warm) / max(1, steps - warm))
    if training["schedule"] == "constant":
        return float(peak)
    if training["schedule"] == "linear":
        return float(peak + (peak * ratio - peak) * part)
    return float(peak * ((1 - ratio) * 0.5 * (1 + math.cos(math.pi * part)) + ratio))


def compare(found: dict[str, str], expected: dict[str, str] | None) -> None:
    """Digests of weights by Hub name, of both sides. Raises CannotRun naming the first weight that the two hold differently."""
    for name, digest in (expected or {}).items():
        if found.get(name) != digest:
            why = "is missing in PyTorch" if name not in found else "differs"
            raise CannotRun(f"the two sides load the checkpoint differently: tensor {name!r} {why}, the first of them")
