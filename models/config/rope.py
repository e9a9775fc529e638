"""Rotary positions: how fast each pair of a head's numbers turns, as trained or stretched over longer rows. No jax here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from moejax.models import foreign_settings as foreign

_NAMES = {"original_max_position_embeddings": "original"}
_OPTIONAL = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
PLAIN: foreign.Table = {
    "rope_theta": foreign.ANY, "rope_type": ("default", "yarn"), "type": ("default", "yarn"), "partial_rotary_factor": (1,),
}  # fmt: skip
YARN: foreign.Table = {**PLAIN, **dict.fromkeys(("factor", *_NAMES, *_OPTIONAL), foreign.ANY), "truncate": (False, True)}


def mscale(factor: float, by: float = 1.0) -> float:
    """What YaRN multiplies attention by where positions are stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


@dataclass(frozen=True)
class Yarn:
    """Positions stretched by `factor`, of a model trained on rows of `original` tokens (arXiv 2309.00071; transformers'
    `_compute_yarn_parameters`).

    A pair that turns more than `beta_fast` times over such a row keeps its speed, one that turns less than `beta_slow` times has it divided
    by `factor`, and those between stand on a ramp, whose ends are rounded outwards if `truncate`. attention_factor: of the rotated q and k;
    None: `mscale(factor)`, or the quotient of both `mscale` and `mscale_all_dim`, as DeepSeek has it.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        for name in ("factor", "original", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            value, least = getattr(self, name), 1 if name in ("factor", "original") else 0
            if value is not None and not (least <= value < math.inf and (least or value > 0 or name.startswith("mscale"))):
                raise ValueError(f"yarn: {name} = {value}: expected a number {f'of at least {least}' if least else 'above 0'}")

    @property
    def scale(self) -> float:
        """Of the rotated q and k."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return mscale(self.factor, self.mscale) / mscale(self.factor, self.mscale_all_dim)
        return mscale(self.factor)

    @classmethod
    def from_hub(cls, settings: Mapping[str, Any], positions: int, where: str) -> Self:
        """Of a config.json's `rope_scaling` or `rope_parameters` (called `where`). positions: the model's own number of them, which is
        `original` where that is not said. Raises ValueError."""
        if settings.get("factor") is None:
            raise ValueError(f'{where}.rope_type = "yarn" lacks factor: expected how far positions are stretched')
        given = {name: foreign.number(settings, name) for name in ("factor", *_OPTIONAL) if settings.get(name) is not None}
        given = {name: value for name, value in given.items() if value or not name.startswith("beta")}  # 0 is none, as in transformers
        original = settings.get("original_max_position_embeddings")
        whole = positions if original is None else foreign.whole_number(settings, "original_max_position_embeddings")
        return cls(original=whole, truncate=bool(settings.get("truncate", True)), **given)

    def to_hub(self) -> dict[str, Any]:
        """As transformers 4 and 5 read it."""
        own = {name: getattr(self, field) for name, field in {"factor": "factor", **_NAMES}.items()}
        more = {name: getattr(self, name) for name in (*_OPTIONAL, "truncate")}
        return {"rope_type": "yarn", **own, **{name: value for name, value in more.items() if value is not None}}


@dataclass(frozen=True)
class Rope:
    """theta: the base of the frequencies; scaling: how they are stretched, if they are."""

    theta: float
    scaling: Yarn | None = None

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0 if self.scaling is None else self.scaling.scale

    def frequencies(self, size: int) -> np.ndarray[Any, Any]:
        """fp32 [size/2]: radians a position of each pair of a head of `size` numbers, computed in transformers' order."""
        turns = np.float32(self.theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
        if self.scaling is None:
            return 1 / turns
        yarn, length = self.scaling, math.log(self.theta)
        fast, slow = (size * math.log(yarn.original / (beta * 2 * math.pi)) / (2 * length) for beta in (yarn.beta_fast, yarn.beta_slow))
        low, high = (math.floor(fast), math.ceil(slow)) if yarn.truncate else (fast, slow)
        low, high = max(low, 0), min(high, size - 1)
        high = high + 0.001 if low == high else high
        ramp = np.clip((np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
        own = 1 - ramp
        return 1 / (np.float32(yarn.factor) * turns) * (1 - own) + 1 / turns * own


def of_hub(config: Mapping[str, Any], positions: int, theta: float) -> Rope:
    """Of a checked config.json, in the dialect of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`)."""
    found = [
        Yarn.from_hub(config[name], positions, name)
        for name in ("rope_parameters", "rope_scaling")
        if isinstance(config.get(name), Mapping) and kind(config[name]) == "yarn"
    ]
    if len(set(found)) > 1:
        raise ValueError("rope_parameters and rope_scaling say different things: expected one of them, or the same")
    return Rope(theta, found[0] if found else None)


def kind(settings: Mapping[str, Any]) -> Any:
    return settings.get("rope_type") or settings.get("type") or "default"


def known(settings: Any) -> foreign.Table:
    """What such a group of settings may say."""
    return YARN if isinstance(settings, Mapping) and kind(settings) == "yarn" else PLAIN
