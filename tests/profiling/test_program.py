"""What a compiled program computes and moves, and where its nameless instructions belong."""

import re

import jax
import jax.numpy as jnp
import pytest
from hlo import dot_flops
from traces import leaves, module

from moejax.profiling.program import Program
from moejax.profiling.xplane import MESSAGES


def total(costs):
    return sum(c.flops for c in costs.values()), sum(c.bytes for c in costs.values())


def test_flops_and_bytes_of_a_product():
    flops, moved = total(Program(module(lambda x, y: x @ y, jnp.ones((32, 64)), jnp.ones((64, 16)))).costs({}))
    assert flops == 2 * 32 * 64 * 16
    assert moved == 4 * (32 * 64 + 64 * 16 + 32 * 16)


def test_flops_agree_with_the_compilers_own_count():
    def layer(x, w):
        return jnp.sum(jnp.tanh(x @ w) @ w.T)

    arguments = jnp.ones((64, 32)), jnp.ones((32, 48))
    theirs = jax.jit(jax.grad(layer, 1)).lower(*arguments).compile().cost_analysis()["flops"]
    ours, _ = total(Program(module(jax.grad(layer, 1), *arguments)).costs({}))
    assert ours == pytest.approx(theirs, rel=0.05)


def scanned(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]


def test_a_loop_of_known_length_counts_its_body_so_often():
    arguments = jnp.ones((16, 32)), jnp.ones((5, 32, 32))
    flops, moved = total(Program(module(scanned, *arguments)).costs({}))
    assert 5 * 2 * 16 * 32 * 32 <= flops <= 1.1 * 5 * 2 * 16 * 32 * 32
    # A pass reads one matrix of the stack, not the stack.
    assert moved < 5 * 4 * (4 * 32 * 32 + 8 * 16 * 32)


def test_a_loop_whose_length_the_data_decide_counts_as_the_trace_shows():
    def repeated(x, w, n):
        return jax.lax.fori_loop(0, n, lambda i, x: jnp.sin(x @ w), x)

    made = module(repeated, jnp.ones((16, 32)), jnp.ones((32, 32)), 3)
    program = Program(made)
    body = [i.name for c in made.computations if c.id != made.entry_computation_id for i in c.instructions]
    once = 2 * 16 * 32 * 32
    for times in (0, 3, 7):
        flops, _ = total(program.costs({name: float(times) for name in body}))
        assert times * once <= flops <= 1.2 * times * once + 100


def test_dots_agree_with_the_text_of_the_module():
    arguments = jnp.ones((16, 32)), jnp.ones((5, 32, 32))
    gradient = jax.grad(lambda x, ws: scanned(x, ws).sum(), 1)
    text = jax.jit(gradient).lower(*arguments).compile().as_text()
    program = Program(module(gradient, *arguments))
    runs = program.executions({})
    ours = sum(
        program.flops_of(i) * runs.get(computation, runs.get(_home(program, computation), 0.0))
        for computation, c in program.computations.items()
        for i in c.instructions
        if i.opcode == "dot"
    )
    assert ours == dot_flops(text)


def _home(program, computation):
    """The computation whose fusion this one is."""
    return next(
        (home for home, c in program.computations.items() for i in c.instructions if computation in i.called_computation_ids), -1
    )


def test_an_instruction_without_a_path_takes_its_neighbours_place():
    def f(x):
        with jax.named_scope("moe"), jax.named_scope("w1"):
            return (x @ x).T @ x

    made = module(f, jnp.ones((24, 24)))
    for c in made.computations:
        for i in c.instructions:
            if i.opcode != "dot" or re.search(r"\.1$", i.name):
                i.metadata.op_name = ""
    program = Program(made)
    assert {next(iter(program.shares(name))).stage for name in leaves(made)} == {"moe/w1"}


def test_a_librarys_product_is_counted_from_its_own_settings():
    """cuBLAS on a GPU: a custom call whose dimension numbers stand in its backend configuration."""
    made = module(lambda x, y: x @ y, jnp.ones((32, 64)), jnp.ones((64, 16)))
    for c in made.computations:
        for i in c.instructions:
            if i.opcode == "dot":
                i.opcode = "custom-call"
                i.backend_config = b'{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    flops, _ = total(Program(made).costs({}))
    assert flops == 2 * 32 * 64 * 16


@pytest.mark.parametrize("batch", [1, 4])
def test_a_convolution_is_the_product_that_a_tpu_makes_of_it(batch):
    """A batch is a spatial axis whose window meets one matrix at each place: 2 x batch x 8 x 16 x 32. A kernel of a TPU says its own."""
    numbers = ("HNC", "HIO", "HNC")
    lhs, rhs = jnp.zeros((batch, 8, 16)), jnp.zeros((batch, 16, 32))

    def product(lhs, rhs):
        strides, dilation = max(batch - 1, 1), batch
        return jax.lax.conv_general_dilated(lhs, rhs, (strides,), [(0, 0)], lhs_dilation=(dilation,), dimension_numbers=numbers)

    lowered = jax.jit(product).lower(lhs, rhs).compiler_ir("hlo").as_serialized_hlo_module_proto()
    program = Program(MESSAGES["HloModuleProto"].FromString(lowered))
    (found,) = [i for i in program.instructions.values() if i.opcode == "convolution"]
    assert found.shape.dimensions == [batch, 8, 32]
    assert program.flops_of(found) == 2 * batch * 8 * 16 * 32
    assert program.is_product(found)


def test_what_a_tpu_moves_is_of_its_memory_and_what_its_fusions_read():
    """Fusions stand in fusions: what one slices of a copy is read, and no more. What lies on the chip is not moved."""

    def shape(rows, space=0):
        return {"element_type": 2, "dimensions": [rows, 8], "layout": {"tiles": [b""], "memory_space": space}}

    def instruction(id, opcode, shape, operands=(), called=()):
        named = {"id": id, "name": f"{opcode}.{id}", "opcode": opcode, "shape": shape}
        return named | {"operand_ids": operands, "called_computation_ids": called}

    def program(space):
        copying = [instruction(1, "parameter", shape(100)), instruction(2, "copy", shape(100), [1])]
        slicing = [instruction(3, "parameter", shape(100)), instruction(4, "fusion", shape(100), [3], [1]),
                   instruction(5, "dynamic-slice", shape(4, space), [4])]  # fmt: skip
        entry = [instruction(6, "parameter", shape(100)), instruction(7, "fusion", shape(4, space), [6], [2]),
                 instruction(8, "negate", shape(4), [7])]  # fmt: skip
        computations = [{"id": n, "instructions": of, "root_id": of[-1]["id"]} for n, of in enumerate((copying, slicing, entry), 1)]
        return Program(MESSAGES["HloModuleProto"](entry_computation_id=3, computations=computations))

    for space, fusion, after in ((0, 64, 64), (1, 32, 32)):
        made = program(space)
        assert [made.bytes_of(made.instructions[name]) for name in ("fusion.7", "negate.8")] == [fusion, after]
