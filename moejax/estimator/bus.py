"""What weights in the host's memory cost a step on the bus, by arithmetic. No jax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moejax.estimator import links, sizes, spread
from moejax.estimator.sizes import ITEM
from moejax.gpus import GPU
from moejax.models.config import Architecture

if TYPE_CHECKING:
    from moejax.config import Experiment

PLACEMENTS = (("device", "device"), ("host", "device"), ("host", "host"))
"""Of experts and tables, from what is fastest to what takes least of the device."""
PCIE = {generation: links.LINKS[f"PCIe {generation}"].rate for generation in (3, 4, 5)}
"""Generation -> bytes/s of a copy out of pinned memory over 16 lanes."""
ROW_BYTES = 1 << 18  # of models/ops/host.py


def step_bytes(experiment: Experiment, config: Architecture, rows: int, row_tokens: int, in_host: int = 0) -> int:
    """Over the bus in one optimizer step: every expert forward and backward, for a micro-batch or all that pass a layer together; for each
    micro-batch the head once, and the embedding or its tokens' rows once (`moejax.models.ops.host`). in_host: all bytes that lie there in a
    pass; those that are no weights are streams, out and back. rows: of one device, and of several its own bus's bytes."""
    held = {False: 0, True: 0}
    for w in spread.each(sizes.stored(experiment, config), config, experiment.mesh):
        held[w.module in config.groups["experts"]] += sum(w.host.values())
    micro, tables = experiment.training.gradient_accumulation, held[False]
    passes = micro // experiment.training.together
    if tables and not config.tie_word_embeddings:
        table, tokens = tables // 2, rows * row_tokens
        looked_up = table if tokens * ROW_BYTES > table else tokens * config.hidden_size * ITEM[experiment.training.compute_dtype]
        tables = table + looked_up
    streams = max(0, in_host - held[True] - held[False])
    return 2 * passes * (held[True] + streams) + micro * tables


def rate(gpu: GPU) -> float:
    """Bytes/s over a card's own link."""
    return links.pcie(gpu).rate
