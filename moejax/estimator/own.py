"""What a step of this program takes on a card: a roofline of the compiled program, and a factor between it and what is measured. No jax.

The roofline (`published/program.json`, fitted by benchmarks/program_law.py to the seconds that benchmarks/gpu_model.py derives from
programs compiled for cards that were not there) counts kernels, bytes, FLOPs and launches; weights in the host's memory add what the bus
takes longer than the card. The factor is a prior as long as nobody measured a run: then the interval is wide, and says so. Receipts of
own runs move and narrow it, those of the same card most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moejax import tpus
from moejax.estimator import bus, closed_form, published, spread
from moejax.estimator.floors import DEQUANTIZATION, EXPERTS, floors
from moejax.estimator.receipts import Receipt
from moejax.estimator.sizes import ITEM
from moejax.gpus import GPU
from moejax.models.config import Architecture, specs
from moejax.models.ops import choice
from moejax.models.ops.quantized import KINDS

if TYPE_CHECKING:
    from moejax.config import Experiment

COLUMNS = ("floor", "block_seconds", "visit_seconds", "scan_seconds")
PRODUCTS, BANDWIDTH = 790 / 989, 4.3 / 4.8
"""Of a data sheet's figures what large products and copies reach: benchmarks/gpu_model.py's, of an H200."""
SCAN_FORWARD, SCAN_BACKWARD = 1.2e12, 0.265e12
"""States/s of the selective scan's kernel on an H200: its instructions over 2.4 a clock and multiprocessor. Nobody has timed it."""
GROUPED = 500e12
"""FLOP/s that the products of `decode` reach on an H200. Assumed: nobody has timed them."""
DECODE = 2.0e12
"""4-bit weights/s of the kernels of `decode` on an H200: 8.6 instructions each, 2.4 a clock and multiprocessor. Nobody has timed it."""
H200_FLOPS, H200_CLOCKS = 989e12, 132 * 1.98
"""FLOP/s of its data sheet; multiprocessors times GHz."""
FACTOR, FACTOR_DEVIATION = 1.2, 0.45
"""Measured seconds over the roofline's, and the deviation of its logarithm: what is believed before any run. The roofline's own error, by
its makers 30 %, of kernels that nobody timed, and of cards."""
TPU_DEVIATION = 0.45
"""Of a TPU's besides: the roofline was fitted to programs of GPUs."""
CARD_DEVIATION, RUN_DEVIATION = 0.25, 0.12
"""Of the part of it that is a card's own, and a run's own."""
NORMAL_90 = 1.645
CALL = 1e-3
"""Of the host for a step, while the card works: jax's dispatch of it (0.85 ms of a program of 32 small layers on a CPU) and its records."""
FORWARD = 1 / 3
"""Of a step's time what its forward pass takes: it is computed again, and then backward."""


@dataclass(frozen=True)
class Counts:
    """One micro-batch: seconds of the floor at the rates above; blocks; experts visited in loops; blocks x chunks of scans (one by the
    scan's kernel). kernel_seconds: of that kernel and those that decode experts' codes, beyond their launches."""

    columns: tuple[float, float, float, float]
    kernel_seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Seconds of an optimizer step, between which they lie with 90 %, and whether a run on this card was measured."""

    seconds: float
    interval: tuple[float, float]
    measured: bool
    basis: str


def counts(
    experiment: Experiment, config: Architecture, gpu: GPU, rows: int, row_tokens: int, *, backend: str | None = None
) -> Counts:
    """backend: of the grouped products; None: the one that is chosen for the card. Of several devices: of one, with this many rows; of the
    experts that it has it visits those that any device's tokens chose."""
    tokens, mesh, dtype = rows * row_tokens, experiment.mesh, experiment.training.compute_dtype
    dealt = spread.count(experiment) if mesh is not None and mesh.weights == "experts" else 1
    halves = [(stack.repeats, *stack.block.halves) for stack in config.stacks]

    def takes(half: specs.MoE | specs.MLP) -> str | None:
        if not isinstance(half, specs.MoE) or half.dense:
            return None
        return backend or _backend(experiment, config, gpu, half, dealt * tokens)

    decode = any(takes(half) == "decode" for *_, half in halves)
    rate = PRODUCTS * gpu.rate(dtype, exact=decode)  # of its products: those of fp32 are not rounded to tf32
    stages = {stage.name: stage for stage in floors(experiment, config, rows, row_tokens)}
    kernel = 0.0
    if decode and (decoded := _decoded(experiment, config, tokens, dealt)) is not None:
        computing = stages.pop(EXPERTS).flops / (rate * GROUPED / (PRODUCTS * H200_FLOPS))
        stages.pop(DEQUANTIZATION)
        kernel = max(computing, decoded[0] / (DECODE * _clocks(gpu)), decoded[1] / (BANDWIDTH * gpu.bytes_per_second))
    floor = sum(
        stage.seconds(rate if stage.name == EXPERTS else PRODUCTS * gpu.rate(dtype), BANDWIDTH * gpu.bytes_per_second)[0]
        for stage in stages.values()
    )
    if gpu.platform == "tpu":  # the other columns are of kernels that a GPU launches
        return Counts((floor, 0.0, 0.0, 0.0))
    visits = scans = 0.0
    for repeats, mixer, half in halves:
        if isinstance(half, specs.MoE) and takes(half) == "loop":
            met = 1 - (1 - half.experts_per_token / half.experts) ** (dealt * tokens)
            visits += repeats * half.experts / dealt * met
        if isinstance(mixer, specs.Mamba):
            shape = rows * experiment.training.together, row_tokens, mixer.inner
            if choice.scan(closed_form.device_of(gpu), *shape, experiment.model.scan)[0] == "kernel":
                scans += repeats
                kernel += repeats * tokens * mixer.inner * mixer.state * (2 / SCAN_FORWARD + 1 / SCAN_BACKWARD) / _clocks(gpu)
            else:
                scans += repeats * row_tokens / choice.CHUNKS["chunked_associative"]
    return Counts((floor, float(config.blocks), visits, scans), kernel)


def _decoded(experiment: Experiment, config: Architecture, tokens: int, dealt: int) -> tuple[float, float] | None:
    """Weights that the kernels of `decode` decode for a micro-batch, and bytes of codes that they read; None where they multiply by arrays.
    Tile by tile of the rows that an expert meets at once, in eight products of its three matrices."""
    kind, weights, together = experiment.kinds(config).get("experts"), 0.0, experiment.training.together
    for stack in config.stacks:
        half = stack.block.feed_forward
        if isinstance(half, specs.MoE) and not half.dense:
            rows = dealt * tokens * together * half.experts_per_token / half.experts
            if kind is None or rows > choice.DECODED_ROWS:
                return None
            matrices = 8 * stack.repeats * half.experts / dealt / together
            weights += matrices * config.hidden_size * half.hidden * max(1.0, rows / choice.DECODED_TILE)
    return weights, weights * KINDS[kind].bytes_per_weight if kind else 0.0


def _clocks(gpu: GPU) -> float:
    """Instructions of a card next to an H200's; without its compiler's target, as its data sheet's FLOP/s."""
    if gpu.compiler is None:
        return gpu.flops_per_second / H200_FLOPS
    return gpu.compiler.multiprocessors * gpu.compiler.clock_ghz / H200_CLOCKS


def _backend(experiment: Experiment, config: Architecture, gpu: GPU, half: specs.MoE, tokens: int) -> str:
    if experiment.model.moe_backend != "auto":
        return experiment.model.moe_backend
    return choice.grouped(
        closed_form.device_of(gpu), tokens * experiment.training.together, half.experts, half.experts_per_token,
        hidden=config.hidden_size, intermediate=half.hidden, quantized="experts" in experiment.kinds(config),
        item=ITEM[experiment.training.compute_dtype], memory_bytes=gpu.memory_bytes,
        dealt=experiment.mesh is not None and experiment.mesh.weights == "experts" and spread.count(experiment) > 1,
    )[0]  # fmt: skip


def program_seconds(experiment: Experiment, config: Architecture, gpu: GPU, rows: int, row_tokens: int) -> float:
    """The roofline of an optimizer step: its micro-batches on the card, or what the bus takes for what is fetched, whichever is longer. Of
    several devices: of each, without what goes between them; rows are those of all. A small model's step waits for its launches."""
    all_rows, rows = rows, -(-rows // spread.count(experiment))
    law = published.read("program.json")["seconds"]
    counted = counts(experiment, config, gpu, rows, row_tokens)
    card = counted.kernel_seconds + sum(law[name] * value for name, value in zip(COLUMNS, counted.columns, strict=True))
    launching = 0.0 if gpu.platform == "tpu" else law["launch"] * config.blocks
    card = max(card, launching) * experiment.training.gradient_accumulation
    if experiment.preference is not None:  # the reference's forward pass
        card *= 1 + FORWARD
    card = max(card, CALL)
    if experiment.placement.experts == "device" and experiment.placement.tables == "device":
        return card
    held = closed_form.on(gpu, settled(experiment), config, all_rows, row_tokens).host
    return max(card, bus.step_bytes(experiment, config, rows, row_tokens, held) / bus.rate(gpu))


def settled(experiment: Experiment) -> Experiment:
    """With the policy that the closed form knows: `auto` comes down to `full` on a full card; what lies between counts as `none`."""
    policy = experiment.training.remat
    return experiment if policy in closed_form.KNOWN else experiment.changed("training", remat="full" if policy == "auto" else "none")


def estimate(seconds: float, gpu: GPU, receipts: Iterable[Receipt]) -> Estimate:
    """Of the roofline's seconds, with what runs of this program took over theirs (`predicted.program_seconds`)."""
    tpu = gpu.platform == "tpu"
    runs = [
        r for r in receipts
        if r.tool_name == "moejax" and r.gpu and r.step_seconds and (r.predicted or {}).get("program_seconds")
        and (r.gpu in tpus.CHIPS) == tpu
    ]  # fmt: skip
    mean, deviation = math.log(FACTOR), math.hypot(FACTOR_DEVIATION, CARD_DEVIATION)
    if tpu and not runs:
        deviation = math.hypot(deviation, TPU_DEVIATION)
    here = [r for r in runs if r.gpu == gpu.name]
    if runs:
        seen = np.array([math.log(float(r.step_seconds or 1) / float((r.predicted or {})["program_seconds"])) for r in runs])
        cards = np.array([r.gpu for r in runs])
        shared = FACTOR_DEVIATION**2 + CARD_DEVIATION**2 * (cards[:, None] == cards[None, :])
        inverse = np.linalg.inv(shared + RUN_DEVIATION**2 * np.eye(len(runs)))
        own = FACTOR_DEVIATION**2 + CARD_DEVIATION**2 * (cards == gpu.name)
        left = deviation**2 - own @ inverse @ own
        mean, deviation = mean + float(own @ inverse @ (seen - mean)), math.sqrt(max(float(left), 0.0))
    half = NORMAL_90 * math.hypot(deviation, RUN_DEVIATION)
    middle = seconds * math.exp(mean)
    if here:
        basis = f"a roofline of the program, fitted to {len(here)} of your runs on this card"
    elif runs:
        basis = f"a roofline of the program, fitted to {len(runs)} of your runs, none on the {gpu.name}: its interval is a prior's part"
    elif tpu:
        basis = "a floor by the chip's data sheet times an assumed efficiency: nothing of moejax has run on a TPU, the interval is a prior"
    else:
        basis = "a roofline of the compiled program times an assumed efficiency: no run of moejax was measured, the interval is a prior"
    return Estimate(middle, (middle * math.exp(-half), middle * math.exp(half)), bool(here), basis)
