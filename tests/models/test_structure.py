"""What the compiled programs do, read from their instructions: no work twice, no scatter backward, one fusion for a dequantization."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from traces import module

from moejax.models.build import build
from moejax.models.config import PRESETS, LoRAConfig, Quantization
from moejax.models.layers import Target
from moejax.models.mamba import Mamba
from moejax.models.ops import quantized
from moejax.models.ops.linear import part
from moejax.profiling.program import Program, elements
from moejax.profiling.scopes import place
from moejax.training.absent import device

WRITERS = {"fusion", "copy", "gather", "concatenate", "convert", "transpose", "dynamic-slice", "broadcast", "call"}


def writers(program, at_least):
    """Instructions outside fusions that write this many elements."""
    found = []
    for computation in program.executions({}):
        instructions = program.computations[computation].instructions
        found += [i for i in instructions if i.opcode in WRITERS and elements(i.shape) >= at_least]
    return found


class TestDequantization:
    """One expert's matrix out of a stack: one fusion reads the codes and writes every weight once.

    A CPU first writes the two halves' codes side by side, a byte each: that fusion is then faster than one that does it all.
    """

    shape = (256, 512)

    def arguments(self, sharding, double):
        codes = quantized.abstract("nf4-double" if double else "nf4", (8, *self.shape))
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), codes)
        return abstract, jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding)

    def check(self, sharding, double, read=0.5, before=()):
        """read: bytes a weight that the fusion reads; before: what else writes as many elements."""
        program = Program(module(lambda t, e: part(t, e).dequantize(jnp.bfloat16), *self.arguments(sharding, double)))
        *first, fusion = writers(program, math.prod(self.shape))
        assert tuple(i.opcode for i in first) == before and all(program.bytes_of(i) == 2 * math.prod(self.shape) for i in first)
        assert fusion.opcode == "fusion" and program.bytes_of(fusion) >= (read + 2) * math.prod(self.shape)
        # The code in and two bytes out a weight; block scales in fp32 once more (1/16 byte), the table.
        assert program.bytes_of(fusion) <= (read + 2.1) * math.prod(self.shape) + 4096

    @pytest.mark.parametrize("double", [False, True])
    def test_on_this_machine(self, double):
        self.check(jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), double, read=1, before=("concatenate",))

    @pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the extra `aot` is not installed")
    @pytest.mark.parametrize("gpu", ["H100", "A100-80"])
    def test_for_gpus_that_are_not_there(self, gpu):
        self.check(jax.sharding.SingleDeviceSharding(device(gpu)), True)


def gradient(config, targets=("w1", "w2", "w3", "gate")):
    """Of a small QLoRA model, all layers recomputed."""
    model = build(
        config, key=jax.random.key(0), quantization=Quantization(), adapter=LoRAConfig(4, 8.0, 0.0, targets), dtype=jnp.float32,
        backend="loop",
    )  # fmt: skip
    graphdef, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)
    tokens = jnp.zeros((2, 64), jnp.int32)

    def loss(trained, frozen):
        hidden, _ = nnx.merge(graphdef, trained, frozen)(tokens, tokens + 1, tokens, remat="full")
        return jnp.sum(hidden)

    return Program(module(jax.grad(loss), trained, frozen))


@pytest.fixture(scope="module")
def sparse_step():
    return gradient(PRESETS["mixtral-tiny"].replace(num_layers=2))


def placed(program):
    """(instruction, its place, the last part of its path), of all instructions that have a path."""
    for i in program.instructions.values():
        if i.metadata.op_name:
            yield i, place(i.metadata.op_name), i.metadata.op_name.rpartition("/")[2]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("mixtral-tiny", {"norm"}), ("qwen3-moe-tiny", {"norm", "attention/norm"}), ("flex-olmo-tiny", {"norm", "attention/norm"})],
)
def test_norms_of_q_and_k_are_the_attentions(preset, expected):
    """Norms have the only reciprocal square roots."""
    config = PRESETS[preset].replace(vocab_size=64, num_layers=1, num_experts=4, experts_per_token=2)
    graphdef, state = nnx.split(build(config, key=jax.random.key(0), dtype=jnp.float32))
    tokens = jnp.ones((1, 16), jnp.int32)
    program = Program(module(lambda s: nnx.merge(graphdef, s)(tokens, tokens, tokens)[0], state))
    assert {p.stage for i, p, _ in placed(program) if i.opcode == "rsqrt"} == expected


def test_experts_have_no_scatter_in_the_backward_pass(sparse_step):
    scatters = {(p.phase, p.stage) for i, p, name in placed(sparse_step) if "scatter" in name or i.opcode == "scatter"}
    assert {s for s in scatters if s[1].startswith("moe")} == {("forward", "moe/dispatch")}  # of a permutation of integers


def test_one_permutation_serves_all_projections(sparse_step):
    """One sort a layer, in the forward pass; the backward pass has neither sort nor top-k."""
    sorts = [(p.phase, p.stage) for i, p, _ in placed(sparse_step) if i.opcode == "sort" and p.stage == "moe/dispatch"]
    assert sorts == [("forward", "moe/dispatch")]
    again = {p.phase for i, p, name in placed(sparse_step) if p.stage == "moe/topk" and (i.opcode == "sort" or "top_k" in name)}
    assert again <= {"forward"}


@pytest.mark.parametrize("preset", ["mixtral-tiny", "flex-olmo-tiny"])
def test_w2_is_not_done_again(preset, request):
    """Nor for a norm behind it: what that reads is kept."""
    program = request.getfixturevalue("sparse_step") if preset == "mixtral-tiny" else gradient(PRESETS[preset].replace(num_layers=2))
    again = {p.stage for i, p, _ in placed(program) if i.opcode == "dot" and p.phase == "recompute"}
    assert "moe/w1" in again and "moe/w2" not in again


def test_a_single_layer_is_recomputed_too():
    """XLA unrolls a loop of one layer: it must not find that the recomputation is the forward pass, and keep what that made of weights."""
    sizes = dict(vocab_size=64, num_layers=2, num_experts=4, experts_per_token=2, dense_size=64)
    program = gradient(PRESETS["deepseek-v3-tiny"].replace(**sizes), ("q_proj", "o_proj"))
    for stage in ("mlp/dequant", "attention/dequant"):
        assert {"forward", "recompute"} <= {p.phase for _, p, _ in placed(program) if p.stage == stage}, stage


def test_w1_and_w3_run_in_one_pass(sparse_step):
    """Every loop over tiles that multiplies by w1 multiplies by w3 too."""

    def products(computation):
        """Stages of the matrix products of a computation, and of what it calls; not of loops inside."""
        found = set()
        for i in sparse_step.computations[computation].instructions:
            if i.opcode == "dot":
                found.add(place(i.metadata.op_name).stage)
            elif i.opcode in ("call", "fusion"):
                found |= set().union(*(products(c) for c in i.called_computation_ids))
        return found & {"moe/w1", "moe/w3"}

    loops = [i for i in sparse_step.instructions.values() if i.opcode == "while"]
    passes = [stages for i in loops for c in i.called_computation_ids if (stages := products(c))]
    assert passes and all(stages == {"moe/w1", "moe/w3"} for stages in passes)


def test_convolution_and_silu_are_one_fusion():
    """Nothing of the size of the row is written between the taps and the activation."""
    from flax import nnx

    config = PRESETS["blackmamba-tiny"]
    mixer = config.stacks[0].block.mixer
    graphdef, state = nnx.split(Mamba(jax.random.key(0), mixer, config, jnp.float32, Target("auto", "cpu")))
    x, segments = jnp.zeros((2, 64, mixer.inner)), jnp.ones((2, 64), jnp.int32)

    def convolved(state, x):
        with jax.named_scope("mamba"), jax.named_scope("conv"):
            return jax.nn.silu(nnx.merge(graphdef, state).conv(x, segments))

    program = Program(module(convolved, state, x))
    written = [i for i in writers(program, x.size) if i.opcode != "call"]
    assert len(written) <= 2, [i.name for i in written]  # the inputs moved by the taps, and all the rest
