"""What both sides agree on: the handed-over experiment, and what PyTorch's side can express of it. No torch here.

`benchmarks/handover.py` writes the folder; everything here needs Python's library and `moejax.models.config` alone, so both environments
and the tests read it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from moejax.models.config import Architecture, BlackMambaConfig, from_hub_config
from moejax.models.families.attention_moe import AttentionMoEConfig

FORMAT = 3
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
        raise CannotRun(f"{path} does not exist: benchmarks/torch_run.py writes such a folder")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise CannotRun(f"{path}: format = {content.get('format')!r}, expected {FORMAT}: write it again with benchmarks/torch_run.py")
    return content


def architecture(content: dict[str, Any]) -> Architecture:
    """The model's sizes, and what follows from them."""
    return from_hub_config(content["hub_config"])


def check(content: dict[str, Any], stack: str) -> None:
    """Raises CannotRun naming the first field that this stack cannot express, and why. content: `experiment` and `hub_config` of it."""
    e, sizes = content["experiment"], architecture(content)
    t, adapter, quantized = e["training"], e["adapter"], e["quantization"]["format"] != "none"
    targets = set() if adapter is None else set(sizes.resolve_targets(adapter["targets"]))
    fits = isinstance(sizes, BlackMambaConfig if stack == "plain" else AttentionMoEConfig)
    cannot = (
        (not fits, f"model is a {sizes.title}", f"the stack {stack!r} is for another ({STACKS[stack]})"),
        (t["optimizer"] != "adamw", f"training.optimizer = {t['optimizer']}", "AdamW alone has the same rule on both sides"),
        (
            bool(e["model"]["aux_loss_coef"]), f"model.aux_loss_coef = {e['model']['aux_loss_coef']}",
            "the runner adds no load-balancing loss",
        ),
        (
            bool(adapter and adapter["dropout"]), f"adapter.dropout = {adapter and adapter['dropout']}",
            "two frameworks cannot draw the same masks",
        ),
        (
            quantized and stack == "today", "quantization.format = nf4",
            "bitsandbytes stores linear layers in 4 bits, and transformers 5 keeps experts as stacked parameters",
        ),
        (
            t["param_dtype"] == "bfloat16_stochastic", "training.param_dtype = bfloat16_stochastic",
            "it rounds to the nearest number: set bfloat16, or float32",
        ),
        (
            adapter is None and stack != "plain" and t["param_dtype"] != t["compute_dtype"],
            f"training.param_dtype = {t['param_dtype']}",
            "transformers holds one copy of a model's weights: it must be equal to training.compute_dtype",
        ),
        (
            adapter is None and bool(t["weight_decay"]) and t["weight_decay_on"] != "all",
            f"training.weight_decay_on = {t['weight_decay_on']}",
            "its AdamW decays whatever it trains: set training.weight_decay_on=all",
        ),
        (
            t["remat"] not in ("none", "full"), f"training.remat = {t['remat']}",
            "its layers are recomputed whole or not at all: full or none, the same for both sides",
        ),
        (
            stack == "study" and bool(adapter and adapter["share"]), f"adapter.share = {adapter and adapter['share']}",
            "PEFT 0.18 trains an A for each matrix: leave it out, or compare with the stack 'today'",
        ),
        (
            stack == "today" and {"w1", "w3"} <= targets and not (adapter and adapter["share"]), "adapter.share = null",
            "PEFT 0.21 trains one A for w1 and w3: set adapter.share=[w1,w3], or compare with the stack 'study'",
        ),
        (
            stack == "today" and len(targets & {"w1", "w3"}) == 1, "adapter.targets",
            "transformers 5 holds w1 and w3 in one parameter: they are adapted together or not at all",
        ),
    )  # fmt: skip
    for wrong, what, why in cannot:
        if wrong:
            raise CannotRun(f"{what}: PyTorch's side cannot express it: {why}")


def compare(found: dict[str, str], trainable: int, content: dict[str, Any]) -> None:
    """Digests of weights by Hub name, and how many parameters are trained, of both sides. Raises CannotRun naming the first weight that
    the two hold differently."""
    for name, digest in (content["digests"] or {}).items():
        if found.get(name) != digest:
            why = "is missing in PyTorch" if name not in found else "differs"
            raise CannotRun(f"the two sides load the checkpoint differently: tensor {name!r} {why}, the first of them")
    expected = content["model"]["params_trainable"]
    if trainable != expected:
        raise CannotRun(f"PyTorch's side trains {trainable:,} parameters, moejax {expected:,}: not the same adapter")
