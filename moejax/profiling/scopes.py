"""From an instruction's path (`op_name`) to the stage and the phase it belongs to.

A path is what `jax.named_scope` and JAX's transformations leave behind, e.g.
`jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/moe/while/body/closed_call/tiles/while/body/w1/to,oi->ti/dot_general`.
Only our own scopes are looked for: what JAX puts between them changes from version to version.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from moejax.models.config import specs

PHASES = ("forward", "recompute", "backward", "optimizer", "other")
COLLECTIVES = "collectives"
"""The phase of what goes between devices, while nothing else runs; only where there are several."""

SCOPES: dict[str, tuple[str, ...]] = {
    "embed": (),
    "layers": (),  # the loop over layers itself: slices of stacked weights, additions to the stream, what is kept for the backward pass
    "norm": (),
    **{half.module: half.scopes for half in specs.HALVES},
    "head_dequant": (),
    "loss": (),
    "optimizer": (),
}
"""Layer kinds, and the parts that are distinguished inside them: the names under which `models` and the train step run."""

OUTSIDE = "other"
"""Stage of what runs under none of these names, and of other programs."""

_WRAPPED = re.compile(r"^(?:jvp|transpose|vmap|checkpoint|remat)\((.*)\)$")


class Place(NamedTuple):
    """Where time is counted. stage: "norm", "attention", "attention/lora", "moe/w1_dequant" …, or "other"."""

    phase: str
    stage: str

    @property
    def layer(self) -> str:
        """The stage's layer kind: its first part."""
        return self.stage.partition("/")[0]


NOWHERE = Place("other", OUTSIDE)


@lru_cache(maxsize=65536)
def place(op_name: str) -> Place:
    """Phase and stage of a path. A path under none of our names is in phase "other" unless JAX's own marks say which it is."""
    layer, part, recomputed = "", "", False
    for token in op_name.split("/"):
        while match := _WRAPPED.match(token):
            token = match[1]
        if token == "rematted_computation":
            recomputed = True
        elif token in SCOPES and not (layer and token in SCOPES[layer]):
            if token != layer:
                layer, part = token, ""
        elif layer and token in SCOPES[layer]:
            part = token
    stage = f"{layer}/{part}" if part else layer or OUTSIDE
    return Place(_phase(op_name, layer, recomputed), stage)


def _phase(op_name: str, layer: str, recomputed: bool) -> str:
    if layer == "optimizer":
        return "optimizer"
    if recomputed:
        return "recompute"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if layer or "jvp(" in op_name else "other"
