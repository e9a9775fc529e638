"""In how many layers the experts fit on the device, the others' in the host's memory; and what that is, in a sentence. No jax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from moejax.estimator import bus, sizes, spread, units
from moejax.gpus import GPU
from moejax.models.config import Architecture

if TYPE_CHECKING:
    from moejax.config import Experiment

TRIES = 4
"""Compiled at most: everything on the device, and after it what arithmetic says, once or twice, and its check."""


def expert_bytes(experiment: Experiment, config: Architecture) -> int:
    """Of all experts that a device has, as far as they may lie in the host's memory."""
    weights = spread.each(sizes.stored(experiment.changed("placement", experts="host"), config), config, experiment.mesh)
    return sum(sum(w.host.values()) for w in weights if w.module in config.groups["experts"])


def most_layers(peak_bytes: Callable[[int], int], layers: int, layer_bytes: float, limit: float) -> int:
    """The largest number of layers, up to all, whose experts fit on the device: 0 where not one layer's do.

    peak_bytes(n): the step's with those of n layers there, 0 < n. With each layer it grows by `layer_bytes`, but to the last: then there
    are no buffers for what is fetched. So few are asked for: all, what follows from that, and what follows from those.
    """
    peak = peak_bytes(layers)
    if peak <= limit:
        return layers
    fits, n = 0, layers - math.ceil((peak - limit) / layer_bytes)
    known: dict[int, int] = {}
    while 0 < n < layers and n not in known and len(known) < TRIES - 1:
        known[n] = peak_bytes(n)
        if known[n] <= limit:
            fits = max(fits, n)
        n = min(n + math.floor((limit - known[n]) / layer_bytes), layers - 1)
    return fits


def told(experiment: Experiment, config: Architecture, card: GPU | None) -> str | None:
    """One line for a run: where its experts lie and what the bus costs it (not without a `card`); None where all are on the device."""
    layers = config.expert_layers
    on_device = experiment.placement.on_device(layers)
    if on_device == layers:
        return None
    held = expert_bytes(experiment, config) * (layers - on_device) / layers
    where = f"experts of {on_device} of {layers} layers on the device, {layers - on_device} in host memory: {units.told(held)}"
    if card is None:
        return where
    t = experiment.training
    times, link = 2 * t.gradient_accumulation // t.together, f"PCIe {card.pcie} x{card.pcie_lanes}"
    return f"{where}, fetched {times} x {units.told(held)} a step over {link}, about {times * held / bus.rate(card):.1f} s"
