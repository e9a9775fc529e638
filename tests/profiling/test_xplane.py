"""Traces as files: what is read, and what is refused."""

import gzip

import jax.numpy as jnp
import pytest
from traces import PROGRAM, Plane, leaves, module, saved, space

from moejax.errors import UserError
from moejax.profiling import breakdown, xplane


@pytest.fixture(scope="module")
def product():
    return module(lambda x: jnp.sin(x @ x), jnp.ones((8, 8)))


def cpu_space(product):
    """One operation that hands a task to another thread, and a marker."""
    made = space()
    Plane(made, "/host:metadata").program(product)
    host = Plane(made, "/host:CPU")
    name = leaves(product)[0]
    python, first, second = (host.line(n) for n in ("python", "tf_XLAEigen/1", "tf_XLAEigen/2"))
    python("train", 0, 100, step_num=4)
    first(name, 10, 30, hlo_op=name, program_id=PROGRAM)
    first("ThreadpoolListener::Record", 12, 12, _p=99)
    second("ThreadpoolListener::StartRegion", 20, 20, _c=99)
    second("end: " + name, 60, 61)
    second("ThreadpoolListener::StopRegion", 70, 70)
    first("ThreadpoolListener::Record", 35, 35, _p=98)  # handed out by nothing of ours
    return made, name


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


def gpu_space(product, gpus=1):
    """Kernels on two streams, a derived line, a copy that belongs to no instruction."""
    made = space()
    Plane(made, "/host:metadata").program(product)
    name = leaves(product)[0]
    for number in range(gpus):
        gpu = Plane(made, f"/device:GPU:{number}")
        compute, copies, derived = (gpu.line(n) for n in ("Stream #7(Compute)", "Stream #8(MemcpyD2D)", "XLA Ops"))
        stats = {"hlo_op": name, "program_id": PROGRAM, "tf_op": "jit(step)/jvp(layers)/while/body/moe/w1/dot_general:"}
        compute("sm90_gemm", 0, 100, **stats)
        compute("sm90_gemm", 100, 200, **stats)
        copies("MemcpyD2D", 150, 250)
        derived(name, 0, 200, **stats)
    Plane(made, "/host:CPU").line("python")("train", 0, 90, step_num=1)
    return made


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
