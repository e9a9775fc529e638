"""Peak memory by arithmetic: what a training step must hold at once, derived from how the program is built. No compiler, no jax.

    peak = arguments + saved activations + gradients + the largest of four moments' temporaries

Arguments are exact (`sizes.py`). The moments are the loss, one layer's expert half and its mixer half in the backward pass
(`block_memory.py`), and the optimizer; for each the arrays that are alive at once are listed with their shapes. Which these are was read
off the compiler's own live ranges; no number in here is fitted to a peak. docs/estimator.md compares it with the compiler on the
repository's configs that compute in bf16.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moejax import gpus
from moejax.errors import UserError
from moejax.estimator import sizes, spread
from moejax.estimator.block_memory import Adapted, Step, block_of
from moejax.estimator.sizes import ITEM
from moejax.gpus import Platform
from moejax.models.config import Architecture, specs
from moejax.models.ops import choice

if TYPE_CHECKING:
    from moejax.config import Experiment
    from moejax.gpus import GPU


KNOWN = ("none", "full", "offload")
"""Rematerialization policies."""


@dataclass(frozen=True)
class Breakdown:
    """Bytes by what they are for. `moment`: when the peak is reached; `saved` holds what the backward pass waits for."""

    weights: dict[str, int]  # by dtype
    adapters: int
    optimizer: int
    batch: int
    gradients: int
    saved: int
    temporaries: int
    moment: str
    host: int = 0  # in the host's memory, next to all this

    @property
    def arguments(self) -> int:
        return sum(self.weights.values()) + self.adapters + self.optimizer + self.batch

    @property
    def total(self) -> int:
        return self.arguments + self.gradients + self.saved + self.temporaries

    def parts(self, peak_bytes: int | None = None) -> dict[str, int]:
        """Named parts; with the compiler's peak also what is left of it: "rest", negative where the closed form is too high."""
        named = {**self.weights, "adapters": self.adapters, "optimizer": self.optimizer, "batch": self.batch}
        named |= {"gradients": self.gradients, "saved activations": self.saved, "temporaries": self.temporaries}
        return named if peak_bytes is None else named | {"rest": peak_bytes - self.total}


def platform_of(gpu: GPU) -> Platform:
    """Which kind of program the compiler makes for a GPU or a TPU's chip; Blackwell (10.0, and 12.0 of the RTX cards) gets Hopper's."""
    return gpu.platform or ("sm9" if gpu.chip.startswith(("GH", "GB")) else "sm80" if gpu.chip == "GA100" else "sm8")


def device_of(gpu: GPU) -> str:
    """The GPU as jax names it, in the tables of what was measured; "gpu" where nothing was measured on one."""
    if gpu.platform == "cpu":
        return "cpu"
    return {gpus.gpu_name(kind): kind for kind in choice.devices()}.get(gpu.name, "gpu")


def on(gpu: GPU, experiment: Experiment, config: Architecture, rows: int, row_tokens: int) -> Breakdown:
    """The closed form for the program that is made for a GPU."""
    return breakdown(
        experiment, config, rows=rows, row_tokens=row_tokens, platform=platform_of(gpu), device=device_of(gpu),
        memory_bytes=gpu.memory_bytes,
    )  # fmt: skip


def _adapted(experiment: Experiment, config: Architecture, stack: specs.Stack) -> Adapted:
    """The adapters of a stack's blocks."""
    adapter, block = experiment.adapter, stack.block
    if adapter is None:
        return Adapted()
    pairs = adapter.lora.of(config)
    own = [target for half in block.halves for target in half.targets if target in pairs]
    experts = [target for target in own if block.feed_forward.targets.get(target) in block.feed_forward.groups.get("experts", ())]
    return Adapted(
        max((pairs[t].rank for t in experts), default=0), sum(pairs[t].rank for t in own if t not in experts),
        any(t in block.mixer.targets for t in own), sum(pairs[t].shares is not None for t in experts),
    )


def _loss(step: Step, vocabulary: int, chunk: int) -> int:
    """A chunk's logits in fp32 and their gradient in the compute dtype (in the same place where both are fp32); hidden states and theirs;
    the head's gradient in fp32 where it is trained."""
    gradient = 0 if step.item == 4 else step.item
    head = 4 * vocabulary * step.width if step.trained else 0
    return min(chunk, step.tokens_together) * vocabulary * (4 + gradient) + 3 * step.tokens_together * step.width * step.item + head


def _scaled(experts: int, dtype: str, platform: Platform) -> int:
    """What the optimizer holds next to the gradients of a full fine-tuning: nothing of fp32, nor on Hopper, which clips them in place;
    of bf16 before Hopper the experts' scaled, one of their three matrices at a time, in fp32."""
    return 2 * experts // 3 if dtype != "float32" and platform in ("sm80", "sm8") else 0


def _fetched(experiment: Experiment, config: Architecture) -> float:
    """Bytes of an expert's weight that come from the host's memory, in the layers whose experts lie there; 0 where none do."""
    if experiment.placement.on_device(config.expert_layers) == config.expert_layers:
        return 0.0
    weights = sizes.stored(experiment.changed("placement", experts="host"), config)
    experts = [w for w in weights if w.module in config.groups["experts"] and not w.adapter]
    return sum(sum(w.host.values()) for w in experts) / max(1, sum(w.size for w in experts))


def _gathered(of_all: tuple[sizes.Stored, ...], weights: tuple[sizes.Stored, ...], config: Architecture) -> float:
    """Bytes of an expert's weight that are gathered from the devices over which its rows are spread."""
    pairs = [(w, own) for w, own in zip(of_all, weights, strict=True) if w.module in config.groups["experts"] and not w.adapter]
    return sum(w.bytes - own.bytes for w, own in pairs if w.shape == own.shape) / max(1, sum(w.size for w, _ in pairs))


def _in_8_bits(w: sizes.Stored) -> int:
    """A weight's clipped gradient, in whose place it is changed piece after piece, and both moments of a piece in fp32."""
    pieces = math.prod(sizes.pieces(w.shape, sizes.stacked_in(w)))
    return (w.bytes if pieces > 1 else 0) + 8 * w.size // pieces


def breakdown(
    experiment: Experiment, config: Architecture, *, rows: int, row_tokens: int, platform: Platform, device: str | None = None,
    memory_bytes: int | None = None,
) -> Breakdown:  # fmt: skip
    """The closed form for one step of this experiment with this many rows a micro-batch. Of several devices: what each holds; rows are
    those of all together.

    device, memory_bytes: see `choice.grouped`; None: a CPU, or a GPU on which nothing was measured, of unknown memory.
    """
    t, adapter = experiment.training, experiment.adapter
    if t.remat not in KNOWN:
        raise UserError(f"training.remat = {t.remat}: the closed form knows {', '.join(KNOWN[:-1])} and {KNOWN[-1]}")
    mesh, n = experiment.mesh, spread.count(experiment)
    rows, of_all = -(-rows // n), sizes.stored(experiment, config)
    weights = spread.each(of_all, config, mesh)
    trained = tuple(w for w in weights if w.trained)
    by_expert = n > 1 and mesh is not None and mesh.weights == "experts" and config.num_experts % n == 0
    device = device or ("cpu" if platform == "cpu" else "gpu")
    step = Step(
        config.hidden_size, 4 if config.stream.fp32 else ITEM[t.compute_dtype], platform, device, memory_bytes,
        experiment.model.moe_backend, rows, row_tokens,
        ITEM[t.compute_dtype], None if adapter else ITEM[t.stored_dtype], t.remat != "none", "experts" in experiment.kinds(config),
        platform not in ("cpu", "tpu") and t.compute_dtype == "bfloat16" and experiment.model.attention != "blocks",
        experiment.model.scan,
        _fetched(experiment, config), experiment.placement.prefetch, t.remat == "offload" and platform != "cpu", t.together,
        n if by_expert else 1, _gathered(of_all, weights, config),
    )  # fmt: skip
    adapted = [_adapted(experiment, config, stack) for stack in config.stacks]
    blocks = [block_of(step, stack.block, on) for stack, on in zip(config.stacks, adapted, strict=True)]
    by_dtype: Counter[str] = Counter()
    for w in weights:
        by_dtype.update({} if w.adapter else w.on_device)
    gradients = sum(w.bytes for w in trained)
    # Those of layers are added to the sums in place; what is in no stack, and all that is rounded stochastically, has its own.
    stacks = {stack.name for stack in config.stacks} if t.param_dtype != "bfloat16_stochastic" else set()
    in_stacks = sum(w.bytes for w in trained if w.module[0] in stacks)
    several = t.gradient_accumulation > t.together
    carried, beside = (gradients, gradients - in_stacks) if several else (0, gradients)
    dense = all(block.moe.dense for block in blocks)
    head = 4 * config.vocab_size * config.hidden_size if not adapter and config.tie_word_embeddings and dense else 0
    experts = sum(w.bytes for w in trained if w.module in config.groups["experts"])
    scaled = 0 if adapter else _scaled(experts, t.stored_dtype, platform)
    if t.optimizer == "adamw_8bit":
        scaled = max(scaled, *(_in_8_bits(w) for w in trained))
    held = [block.saved(stack.repeats) for stack, block in zip(config.stacks, blocks, strict=True)]
    table = config.vocab_size * config.hidden_size * step.item if experiment.placement.tables == "host" else 0
    moments = [("loss", carried, sum(held), _loss(step, config.vocab_size, t.loss_chunk(config.vocab_size)) + table)]
    for number, block in enumerate(blocks, 1):  # backwards: what later stacks held is free
        for part, temporaries in (("experts, backward", block.experts()), ("mixer, backward", block.mixer.backward)):
            moments.append((part, carried + beside, sum(held[:number]), temporaries + head))
    moments.append(("optimizer", gradients, 0, scaled))
    if not step.remat:
        moments.append(("last layer, forward", carried, sum(held), blocks[-1].forward()))
    moment, g, s, temporaries = max(moments, key=lambda m: sum(m[1:]))
    return Breakdown(
        dict(by_dtype),
        sum(w.bytes for w in weights if w.adapter),
        spread.moment_bytes(experiment, config, of_all),
        sizes.batch_bytes(config, t.gradient_accumulation, rows, row_tokens),
        g,
        s,
        temporaries,
        moment,
        sum(sum(w.host.values()) for w in weights)
        + sum(block.in_host(stack.repeats) for stack, block in zip(config.stacks, blocks, strict=True)),
    )
