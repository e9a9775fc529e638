"""How a run's experts are multiplied, by what it attends and scans: said at its start. And how often a compiled step's loops over experts
run with a given routing."""

from __future__ import annotations

from typing import Any

import numpy as np

from moejax.config import Experiment
from moejax.errors import UserError
from moejax.estimator.sizes import ITEM
from moejax.estimator.units import counted
from moejax.gpus import GPU, capability
from moejax.models.config import Architecture, specs
from moejax.models.ops import choice, flash, scan_kernel
from moejax.models.ops.choice import here, is_tpu, measured, memory_here
from moejax.models.ops.grouped import decode, ragged
from moejax.models.ops.grouped.matmul import Plan, choose
from moejax.profiling.program import Trips


def plan(experiment: Experiment, config: Architecture, tokens: int, card: GPU | None = None) -> Plan | None:
    """What `moejax.models.moe` will choose for micro-batches of this many tokens, on this card or here; None where all experts see all
    tokens."""
    tokens *= experiment.training.together
    if config.experts_per_token == config.num_experts:
        return None
    device, memory_bytes = (here(), memory_here()) if card is None else (card.cuda_name, card.memory_bytes)
    dealt = experiment.mesh is not None and experiment.mesh.weights == "experts" and experiment.mesh.devices != 1
    return choose(
        experiment.model.moe_backend, device, tokens, config.num_experts, config.experts_per_token,
        hidden=config.hidden_size, intermediate=config.intermediate_size, quantized="experts" in experiment.kinds(config),
        item=ITEM[experiment.training.compute_dtype], memory_bytes=memory_bytes, dealt=dealt,
    )  # fmt: skip


def announce(experiment: Experiment, config: Architecture) -> str:
    """One line for the start of a run."""
    tokens = experiment.data.batch_rows * experiment.data.longest_row
    chosen = plan(experiment, config, tokens)
    if chosen is None:
        return "experts: dense, every token through every expert in batched products"
    rows = tokens * experiment.training.together * config.experts_per_token // config.num_experts
    entry = measured(here(), rows, config.hidden_size * config.intermediate_size, "experts" in experiment.kinds(config))
    source = f"not measured on {here()}" if entry is None else f"measured: {entry['measured']}"
    why = f"auto, {source}" if experiment.model.moe_backend == "auto" else "model.moe_backend"
    what = {
        "loop": f"tiles of {chosen.tile} and {chosen.small_tile} rows",
        "ragged": "one product of all rows",
        "decode": "one kernel a product for all rows, which decodes 4-bit codes itself",
        "capacity": f"{chosen.capacity} rows an expert in one batch, the rest in tiles of {chosen.tile}",
    }[chosen.backend]
    return f"experts: {chosen.backend}, {what} ({why})"


def announce_attention(experiment: Experiment, config: Architecture, platform: str) -> list[str]:
    """One line for the start of a run on a GPU or TPU (`choice.here`), none on a CPU and of a model that does not attend."""
    heads = attending(config)
    if platform == "cpu" or not heads:
        return []
    asked, dtype, length = experiment.model.attention, experiment.training.compute_dtype, experiment.data.longest_row
    reasons = {flash.why_blocks(asked, platform, dtype, head_dim, length, lacking) for head_dim, lacking in heads} - {None}
    return [f"attention: {f'blocks of queries ({reasons.pop()})' if reasons else 'flash, by the kernels of jax'}"]


def precision(experiment: Experiment, platform: str) -> list[str]:
    """A line for the start of a run, where products of fp32 numbers are not products in fp32 (`choice.here`)."""
    if not is_tpu(platform) or experiment.training.compute_dtype != "float32":
        return []
    return [
        f"precision: a {platform} multiplies bfloat16 numbers: products of training.compute_dtype = float32 round their operands to it "
        "(JAX_DEFAULT_MATMUL_PRECISION=highest: fp32 in six products)"
    ]


def check(experiment: Experiment, config: Architecture, platform: str) -> None:
    """Raises UserError where a kernel is asked for by name and cannot run on the platform (`choice.here`)."""
    if experiment.model.moe_backend == "ragged" and (reason := ragged.refusal(platform)):
        raise UserError(f"model.moe_backend = ragged is {reason}, and this is a {platform}. Expected auto, loop or capacity")
    if experiment.model.moe_backend == "decode" and (reason := decode.refusal(platform, capability(platform))):
        raise UserError(f"model.moe_backend = decode is {reason}. Expected auto, loop or capacity")
    check_attention(experiment, config, platform)
    check_scan(experiment, config, platform)


def check_attention(experiment: Experiment, config: Architecture, platform: str) -> None:
    """Raises UserError where flash attention is asked for by name and cannot run on the platform (`choice.here`)."""
    if experiment.model.attention != "flash":
        return
    for head_dim, lacking in attending(config):
        reason = flash.refusal(platform, experiment.training.compute_dtype, head_dim, lacking)
        if reason is not None:
            raise UserError(f"model.attention = flash: {reason}. Expected auto (flash where it can run) or blocks")


def announce_scan(experiment: Experiment, config: Architecture, platform: str) -> list[str]:
    """One line for the start of a run on a GPU (`choice.here`), none on a CPU and of a model without a selective scan."""
    channels = {stack.block.mixer.inner for stack in config.stacks if isinstance(stack.block.mixer, specs.Mamba)}
    if platform == "cpu" or platform.startswith("TPU") or not channels:
        return []
    shape = experiment.data.batch_rows, experiment.data.longest_row, max(channels)
    form, chunk = choice.scan(platform, *shape, experiment.model.scan)
    why = "model.scan" if experiment.model.scan != "auto" else f"auto, {'' if choice.table('scan').get(platform) else 'not '}measured here"
    return [f"selective scan: {form}, chunks of {counted(chunk, 'token')} ({why})"]


def check_scan(experiment: Experiment, config: Architecture, platform: str) -> None:
    """Raises UserError where the scan's kernel is asked for and cannot run on the platform (`choice.here`), or the model has no scan."""
    if experiment.model.scan != "kernel":
        return
    if not any(isinstance(stack.block.mixer, specs.Mamba) for stack in config.stacks):
        raise UserError("model.scan = kernel: this model has no selective scan. Expected auto")
    reason = scan_kernel.refusal(platform, capability(platform))
    if reason is not None:
        form, chunk = choice.scan(platform, experiment.data.batch_rows, experiment.data.longest_row, 1)
        raise UserError(f"model.scan = kernel: {reason}. Expected auto ({form}, chunks of {counted(chunk, 'token')}, runs instead)")


def attending(config: Architecture) -> set[tuple[int, str | None]]:
    """Of the mixers that attend: numbers of a head, and what flash attention lacks for them. Empty where none does."""
    mixers = [stack.block.mixer for stack in config.stacks if hasattr(stack.block.mixer, "head_dim")]
    return {(m.head_dim, lacking(m)) for m in mixers}


def lacking(mixer: Any) -> str | None:
    """What flash attention lacks for a mixer that attends; None: nothing."""
    return flash.LATENT if isinstance(mixer, specs.MLA) else flash.unsupported(mixer.sinks, mixer.window)


def uniform_loads(config: Architecture, tokens: int) -> np.ndarray:
    """Tokens of each expert if every one has its share: [E]."""
    return np.full(config.num_experts, tokens * config.experts_per_token // config.num_experts)


def random_loads(config: Architecture, tokens: int, routings: int = 64) -> np.ndarray:
    """Tokens of each expert as drawn routings have them, every expert as likely as any other: [routings, E]. Equal loads flatter tiles:
    they leave nothing over."""
    drawn = np.random.default_rng(0).multinomial(tokens * config.experts_per_token, [1 / config.num_experts] * config.num_experts, routings)
    return np.asarray(drawn)


def routed(plan: Plan, loads: np.ndarray) -> Trips:
    """How often what depends on the routing runs, for `loads` [..., E] (tokens of an expert): the mean over all routings in it.

    The loops over tiles: an expert's two, or of the backend `capacity` a layer's one. For anything else the answer raises ValueError.
    """
    loads = loads.reshape(-1, loads.shape[-1])
    plan = plan._replace(tile=max(plan.tile, 1), small_tile=max(plan.small_tile, 1))  # of a backend without loops it is 0
    whole = (loads + (plan.tile - 1 if plan.small_tile == plan.tile else plan.tile // 2)) // plan.tile
    small = -(-np.maximum(loads - whole * plan.tile, 0) // plan.small_tile)
    if plan.backend == "capacity":
        whole = np.sum(-(-np.maximum(loads - plan.capacity, 0) // plan.tile), axis=1)

    def trips(path: str, branch: int | None) -> float:
        if branch is None and "tiles" in path:
            return float(np.mean(small if "small_tiles" in path else whole))
        what = "loop" if branch is None else "conditional"
        raise ValueError(f"{path or f'a {what} without a path'}: how often this {what} runs is not known")

    return trips
