"""Traces as files: what is read, and what is refused."""

import gzip

import jax.numpy as jnp
import pytest
from traces import PROGRAM, cpu_space, gpu_space, module, saved, space

from moejax.errors import UserError
from moejax.profiling import breakdown, xplane


@pytest.fixture(scope="module")
def product():
    return module(lambda x: jnp.sin(x @ x), jnp.ones((8, 8)))


def test_events_steps_programs_and_tasks(product, tmp_path):
    made, name = cpu_space(product)
    trace = xplane.read(xplane.find(saved(made, tmp_path).parents[3]))
    assert [(e.start, e.end, e.instruction, e.program) for e in trace.events] == [(10, 30, name, PROGRAM)]
    assert trace.events[0].tasks == ((20, 60),)
    assert [(s.number, s.start, s.end) for s in trace.steps] == [(4, 0, 100)]
    assert trace.programs[PROGRAM].name == product.name and trace.platform == "cpu" and not trace.compiled


def test_gzip_is_read_too(product, tmp_path):
    made, _ = cpu_space(product)
    file = tmp_path / "trace.xplane.pb.gz"
    file.write_bytes(gzip.compress(made.SerializeToString()))
    assert len(xplane.read(file).events) == 1


def test_gpu_streams(product, tmp_path):
    trace = xplane.read(saved(gpu_space(product), tmp_path))
    assert trace.platform == "gpu"
    assert [(e.kernel, e.start, e.end) for e in trace.events] == [
        ("sm90_gemm", 0, 100), ("sm90_gemm", 100, 200), ("MemcpyD2D", 150, 250)
    ]  # fmt: skip
    assert trace.events[0].op_name == "jit(step)/jvp(layers)/while/body/moe/w1/dot_general"
    b = breakdown.analyze(trace)
    # The copy shares half of 150..200 and has 200..250 for itself: it is no stage of ours. The host's marker ends before the device does.
    assert b.sums("stage")["other"] == pytest.approx(75e-12)
    assert b.busy_seconds == pytest.approx(250e-12) and b.step_seconds == pytest.approx(250e-12)


def test_two_gpus_are_a_mean_device(product, tmp_path):
    trace = xplane.read(saved(gpu_space(product, gpus=2), tmp_path))
    assert [e.device for e in trace.events] == [0, 1, 0, 1, 0, 1]
    one, two = (breakdown.analyze(xplane.read(saved(gpu_space(product, gpus=n), tmp_path))) for n in (1, 2))
    assert two.sums("stage") == pytest.approx(one.sums("stage")) and two.step_seconds == one.step_seconds
    assert two.cost == one.cost and two.working == pytest.approx({0: 250e-12, 1: 250e-12}) and one.working.keys() == {0}


@pytest.mark.parametrize(
    "damage",
    [
        lambda program, dot: dot.operand_ids.append(99),
        lambda program, dot: dot.operand_ids.__delitem__(0),
        lambda program, dot: dot.operand_ids.__setitem__(0, dot.id),
        lambda program, dot: dot.called_computation_ids.append(program.computations[-1].id),
        lambda program, dot: dot.dot_dimension_numbers.lhs_contracting_dimensions.append(2),
        lambda program, dot: dot.shape.dimensions.extend([2**62] * 20),
        lambda program, dot: setattr(program.computations[0], "root_id", 99),
        lambda program, dot: setattr(program, "entry_computation_id", 99),
        lambda program, dot: program.computations.add().CopyFrom(program.computations[0]),
    ],
)
def test_a_program_that_names_what_is_not_in_it(damage, product, tmp_path):
    made = gpu_space(product)
    (stat,) = made.planes[0].event_metadata[PROGRAM].stats
    embedded = xplane.MESSAGES["HloProto"].FromString(stat.bytes_value)
    program = embedded.hlo_module
    damage(program, next(i for c in program.computations for i in c.instructions if i.opcode == "dot"))
    stat.bytes_value = embedded.SerializeToString()
    with pytest.raises(UserError, match=r"host\.xplane\.pb is damaged \(.*: profile again"):
        xplane.read(saved(made, tmp_path))


def test_what_is_no_trace(product, tmp_path):
    with pytest.raises(UserError, match="no such run"):
        xplane.find(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no trace .*moejax profile CONFIG"):
        xplane.find(tmp_path)
    file = saved(cpu_space(product)[0], tmp_path)
    saved(space(), tmp_path, host="other")
    with pytest.raises(UserError, match=r"traces of several hosts \(host, other\)"):
        xplane.find(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is no whole trace"):
        xplane.read(file)
    file.write_bytes(space().SerializeToString())
    with pytest.raises(UserError, match="has no events of XLA programs"):
        xplane.read(file)
    packed = tmp_path / "cut.xplane.pb.gz"
    packed.write_bytes(gzip.compress(whole)[:-30])
    with pytest.raises(UserError, match="is no whole trace"):
        xplane.read(packed)


def test_a_compilation_inside_the_trace_is_told(product, tmp_path):
    made, _ = cpu_space(product)
    host = next(p for p in made.planes if p.name == "/host:CPU")
    host.event_metadata[77].id, host.event_metadata[77].name = 77, "CpuCompiler::RunBackend"
    host.lines[0].events.add(metadata_id=77, offset_ps=1, duration_ps=1)
    trace = xplane.read(saved(made, tmp_path))
    with pytest.raises(UserError, match="a program was compiled while the trace was taken"):
        breakdown.analyze(trace)


def test_a_trace_without_its_programs_is_told(product, tmp_path):
    made, _ = cpu_space(product)
    del made.planes[0]
    with pytest.raises(UserError, match="does not hold the programs"):
        breakdown.analyze(xplane.read(saved(made, tmp_path)))
