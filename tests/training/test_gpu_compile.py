"""The real steps compile for GPUs that are not there, at the lengths that batches have; a compile that fails is one message. Needs the
extra `aot` (`make test` gives it this file in an environment of its own)."""

import importlib.util
import re
import sys

import jax
import numpy as np
import pytest
from support import ROOT

from moejax import config, gpus
from moejax.data.batching import Batches
from moejax.data.tokenize import Query
from moejax.errors import UserError
from moejax.estimator import bus, closed_form, sizes
from moejax.profiling import collectives
from moejax.profiling.program import Program, module_of
from moejax.training import experts, program
from moejax.training.program import TrainProgram

sys.path[:0] = [str(ROOT / "benchmarks")]

import gpu_model  # noqa: E402
import kernel_table  # noqa: E402

needs_aot = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the extra `aot` is not installed (BUILD.md)"
)
NEWER = jax.__version_info__ >= (0, 11)
DEPTH = "model.overrides.num_layers=2"  # layers are scanned: two compile as 32 do


def experiment(name, *overrides):
    return config.load(ROOT / "configs" / f"{name}.yaml", [DEPTH, *overrides])


def padded(e, longest):
    """Tokens of the rows that `pad_longest` makes of a batch whose longest query has this many."""
    section = e.data.model_copy(update={"batching": "pad_longest", "batch_rows": 2})
    queries = [Query.after(1, np.ones(n, np.int32)) for n in (longest, 7)]
    return next(Batches(queries, section, 0).iterate(0)).tokens.shape[1]


@needs_aot
@pytest.mark.parametrize(
    ("name", "gpu", "rows", "longest", "most_peak_gb", "most_moved_gb", "most_kernels"),
    [("mixtral_8x7b_cs_sparse", "H100", 2, 372, 4, 45, 2200), ("mixtral_8x7b_cs_sparse", "L4", 8, 75, 4, 45, 2300),
     ("blackmamba_2.8b_cs_sparse", "H100", 1, 130, 4, 17, 950), ("blackmamba_2.8b_cs_sparse", "L4", 2, 365, 4, 24, 1400),
     ("qwen3_30b_a3b_48gb", "A40", 2, 372, 4.6, 28, 800)],  # of its peak 1.2 GB are a layer's dequantized experts
)  # fmt: skip
def test_the_step_compiles_and_wastes_nothing(name, gpu, rows, longest, most_peak_gb, most_moved_gb, most_kernels):
    """At any length of a query, for drawn routings. A step is one CUDA graph, no loop asks the host, no tile copies an expert's matrix (but
    for a BlackMamba's on an H100, whose 3872 rows XLA pads for a product of 128 tokens), and what is moved and launched is at most a tenth
    more than jax 0.10.2 compiles. A newer compiler fuses otherwise: up to a twentieth more kernels."""
    e = experiment(name)
    told, _, _ = gpu_model.compiled(e, gpu, rows, padded(e, longest))
    assert told["arguments_gb"] < told["peak_gb"] < most_peak_gb
    assert NEWER or (told["graphs"], told["outside"]) == (1, 0)
    assert told["syncs"] == 0 and (told["copies"] == 0 or (name.startswith("blackmamba") and gpu == "H100"))
    assert told["moved_gb"] < most_moved_gb and told["kernels"] < most_kernels * (1.05 if NEWER else 1)


@needs_aot
@pytest.mark.long
@pytest.mark.parametrize("gpu", ["A100-80", "A40", "L4", "H100", "RTX-5090"])
def test_our_kernels_spill_no_register(gpu):
    rows = [row for name, make in kernel_table.KERNELS.items() for row in kernel_table.compiled_for(gpu, name, *make())]
    products = {"grouped_forward", "grouped_backward", "grouped_gradient"}
    assert {row["kernel"] for row in rows} == {"scan_forward", "scan_backward", "decode_forward", "decode_backward", *products}
    assert {row["spilled_bytes"] for row in rows} == {0}


@needs_aot
def test_micro_batches_hold_no_second_gradients():
    """Of rank 64 on seven matrices: layers add theirs to the sums in place."""
    targets = "adapter.targets=[q_proj,k_proj,v_proj,o_proj,w1,w2,w3]"
    one, two = (experiment("mixtral_8x7b_cs_sparse", targets, "adapter.rank=64", f"training.gradient_accumulation={n}") for n in (1, 2))
    architecture = sizes.architecture_of(one)
    gradients = sum(w.bytes for w in sizes.adapters(one, architecture))
    peaks = [TrainProgram(e, architecture, gpu="H100").compile(2, 704).peak_bytes for e in (one, two)]
    assert gradients > 2e8 and peaks[1] - peaks[0] < 0.1 * gradients


@needs_aot
@pytest.mark.parametrize("placed", ["host", pytest.param(2, marks=pytest.mark.long)])
def test_experts_in_the_hosts_memory_come_ahead_of_their_products(placed, tmp_path):
    """Two layers', after others' on the device or alone: there is neither the stack nor a copy of it, no loop asks the host, every fetch of
    an expert begins before the products of the one before it and is awaited behind them, and the bus carries what the estimate says."""
    depth = "model.overrides.num_layers=4" if placed == 2 else DEPTH
    e = experiment("mixtral_8x7b_cs_sparse", depth, f"placement.experts={placed}", "placement.tables=host")
    architecture, card = sizes.architecture_of(e), gpus.find("L4")
    compiled = TrainProgram(e, architecture, gpu="L4", dump=tmp_path).compile(1, 112)
    stored = sizes.stored(e, architecture)
    assert compiled.host_bytes == sum(sum(w.host.values()) for w in stored) > 1.7e9
    on_device = sum(sum(w.on_device.values()) for w in stored if w.module in architecture.groups["experts"] and not w.adapter)
    assert compiled.argument_bytes < compiled.peak_bytes < 1.1e9 + (on_device + 5e8 if placed == 2 else 0)
    routed = experts.routed(experts.plan(e, architecture, 112, card), experts.random_loads(architecture, 112))
    step = gpu_model.step(compiled.executable, gpu_model.thunks(tmp_path), routed, gpu_model.Rates.of(card))
    assert step.syncs == 0 and step.fetched == pytest.approx(bus.step_bytes(e, architecture, 1, 112), rel=0.01)
    (module,) = (path for path in tmp_path.glob("*after_optimizations.txt"))
    loops = 0
    for lines in scheduled(module.read_text()):
        starts = {name: at for at, name in named(lines, r"%(dynamic-slice-start[\w.]*) = \(\(u8\[2,8,\d+,(?:2048|7168)\]\S+S\(5\)")}
        ends = {name.replace("done", "start"): at for at, name in named(lines, r"%(dynamic-slice-done[\w.]*) = ")}
        products = [at for at, _ in named(lines, r"%(while[\w.]*) = ")]
        # The loops over experts hold one loop over tiles, the layers' hold others: codes of three matrices.
        if len(starts) == 3 and len(products) == 1:
            loops += all(starts[name] < products[0] < ends[name] for name in starts)
    assert loops == 2  # forward and backward


def scheduled(text):
    """The lines of each computation, in the order in which the device gets them."""
    return [block.splitlines() for block in text.split("\n\n") if "S(5)" in block]


def named(lines, pattern):
    """(line, name) of the instructions that match."""
    return [(at, match[1]) for at, line in enumerate(lines) if (match := re.search(pattern, line))]


@needs_aot
def test_offloaded_streams_leave_the_device():
    """Those of two layers, 2 x 704 tokens: both halves' are counted with the host's bytes, and none stands on the device."""
    e = experiment("mixtral_8x7b_cs_sparse", "training.remat=offload")
    compiled = TrainProgram(e, sizes.architecture_of(e), gpu="H100").compile(2, 704)
    text = compiled.executable.as_text()
    assert compiled.host_bytes == pytest.approx(2 * 2 * 2 * 704 * 4096 * 2, rel=0.01)
    assert "bf16[2,2,704,4096]{3,2,1,0:S(5)}" in text and "bf16[2,2,704,4096]{3,2,1,0} " not in text


@needs_aot
def test_waste_would_be_seen(monkeypatch):
    """As XLA compiles it by itself: it joins products, and copies matrices for it (a newer one does not); its loops ask the host."""
    monkeypatch.setattr(program, "GPU_OPTIONS", {})
    e = experiment("mixtral_8x7b_cs_sparse")
    told, _, _ = gpu_model.compiled(e, "H100", 2, 384)
    assert told["syncs"] > 0 and (NEWER or (told["copies"] > 0 and told["moved_gb"] > 45))


@needs_aot
@pytest.mark.skipif(NEWER, reason="the Triton of a newer jax has tiles for these rows")
def test_a_compile_that_fails_is_one_message(monkeypatch):
    """Triton has no tiles for a BlackMamba's rows of 368 tokens on an L4: cuBLAS makes the products (above). Without it: what fails, for
    which device, and what to try."""
    monkeypatch.setattr(program, "CUBLAS", {})
    e = experiment("blackmamba_2.8b_cs_sparse")
    with pytest.raises(UserError) as told:
        TrainProgram(e, sizes.architecture_of(e), gpu="L4").compile(2, 368)
    message = str(told.value)
    assert message.startswith(f"the step of {e.name} (2 rows x 368 tokens) does not compile for NVIDIA L4: INTERNAL: ")
    assert "\n" not in message and "Try rows of a multiple of 16 tokens" in message


@needs_aot
@pytest.mark.long
@pytest.mark.parametrize("weights", ["whole", "spread", "experts"])
def test_what_goes_between_devices_is_what_the_estimate_says(weights):
    """Of four: no collective in a branch or a loop of data; one sum of the gradients; bytes as by arithmetic."""
    e = experiment("mixtral_8x7b_cs_sparse", "data.batch_rows=8", "mesh.devices=4", f"mesh.weights={weights}")
    told, _, executable = gpu_model.compiled(e, "H100", 8, 512)
    assert told["under_data"] == [] and told["syncs"] == 0 and told["devices"] == 4
    assert told["received_gb"] == pytest.approx(told["estimated_gb"], rel=1e-3)
    made = closed_form.on(gpus.find("H100"), e, sizes.architecture_of(e), 8, 512)
    assert made.arguments == pytest.approx(1e9 * told["arguments_gb"], abs=1e6) and abs(told["closed_form_error"]) < 0.06
    assert set(told["collectives"]) == {"whole": {"all-reduce"}, "spread": {"all-reduce", "all-gather"},
                                        "experts": {"all-reduce", "all-gather", "reduce-scatter"}}[weights]  # fmt: skip
    # Gradients are summed once, outside every loop, in as many sums as XLA makes of them (some tens of MB each), and norms and counts.
    program = Program(module_of(executable))
    sums = [i for i in program.instructions.values() if collectives.kind(program, i) == "all-reduce"]
    assert told["collectives"]["all-reduce"] == len(sums) < 8
