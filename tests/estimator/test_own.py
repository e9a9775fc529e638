"""This program's seconds: a roofline that knows placements and cards, and a factor that own runs move."""

import pytest
from support import ROOT

from moejax import cli, config, gpus
from moejax.estimator import lengths, own, receipts, workload
from moejax.estimator.sizes import architecture_of
from moejax.estimator.tools import fitted, forecast
from moejax.models.config import FAMILIES, PRESETS


def program(name, gpu, *changes):
    experiment = config.load(ROOT / "configs" / f"{name}.yaml", changes)
    sizes = architecture_of(experiment)
    experiment = experiment.with_defaults(sizes)
    return own.program_seconds(experiment, sizes, gpus.find(gpu), experiment.data.batch_rows, experiment.data.longest_row)


def run(gpu, ratio, name="a"):
    return receipts.Receipt(
        id=name, model="m", tool="moejax", tool_name="moejax", gpu=gpu, weights="nf4+dq", experts_in="device", micro_batch=1,
        accumulation=1, step_seconds=ratio, source="a run", predicted={"program_seconds": 1.0},
    )  # fmt: skip


def test_the_roofline_knows_cards_and_placements():
    assert program("mixtral_8x7b", "H100") < program("mixtral_8x7b", "A40")
    here, there = program("mixtral_8x7b", "B200"), program("mixtral_8x7b", "B200", "placement.experts=host")
    assert there > here and there > 23e9 * 2 / 51e9  # every expert over the bus, forward and backward
    pairs, alone = (program("dpo_demo", "H100", *changes) for changes in ((), ("preference=null",)))
    assert pairs == pytest.approx(alone * 4 / 3)  # the reference's forward pass
    four = program("mixtral_8x7b", "H100", "training.gradient_accumulation=4")
    assert four == pytest.approx(4 * program("mixtral_8x7b", "H100"))


def test_fp32_takes_the_rate_of_fp32():
    fp32 = "training.compute_dtype=float32", "training.param_dtype=float32"
    size = "data.batch_rows=8", "data.max_length=512", "data.row_tokens=512"
    tflop = 0.47e14 * 1.3588  # products of a step, with the law's factor; scores and norms apart
    for gpu, rate in (("T4", 8.1), ("V100-32", 15.7), ("A100-80", 156)):
        assert program("mixtral_8x7b_cs_sparse", gpu, *size, *fp32) > tflop / (rate * 1e12 * own.PRODUCTS)
    assert program("mixtral_8x7b_cs_sparse", "T4", *size, *fp32) > 7 * program("mixtral_8x7b_cs_sparse", "A100-80", *size, *fp32)
    decode, loop = (program("mixtral_8x7b_cs_sparse", "A100-80", *size, *fp32, f"model.moe_backend={by}") for by in ("decode", "loop"))
    assert decode > 3 * loop  # fp32 products of `decode` are exact: 19.5, not 156 TFLOP/s


def test_a_small_models_step_waits_for_its_launches():
    """Four blocks of 64 numbers: no work, and the kernels of a block take half a millisecond to launch."""
    few = program("demo", "B200", "model.moe_backend=capacity", "data.batch_rows=1")
    assert few == program("demo", "L4", "model.moe_backend=capacity", "data.batch_rows=1") and 1e-3 <= few < 5e-3


@pytest.mark.parametrize(("gpu", "derived"), [("H100", 0.2163)])
def test_the_scans_kernel_is_counted_where_it_runs(gpu, derived):
    """Next to the seconds of the compiled program (benchmarks/results/2026-12-01-one-graph.json)."""
    size = "data.batch_rows=16", "data.row_tokens=512", "data.max_length=512", "model.scan=kernel"
    assert program("blackmamba_2.8b_cs_sparse", gpu, *size) == pytest.approx(derived, rel=0.15)
    if gpu == "H100":
        assert program("blackmamba_2.8b_cs_sparse", gpu, *size) < 0.95 * program("blackmamba_2.8b_cs_sparse", gpu, *size[:3])


def test_own_runs_move_and_narrow_the_factor():
    card, other = gpus.find("A40"), gpus.find("H100")

    def width(found):
        return found.interval[1] / found.interval[0]

    prior = own.estimate(1.0, card, ())
    assert not prior.measured and prior.interval[0] < 1 < prior.interval[1] and "no run of moejax was measured" in prior.basis
    runs = [run("A40", 2.0, "a"), run("A40", 2.2, "b")]
    here, there = own.estimate(1.0, card, runs), own.estimate(1.0, other, runs)
    assert here.measured and here.seconds == pytest.approx(2.1, rel=0.05) and here.interval[0] < 2.0 < 2.2 < here.interval[1]
    assert not there.measured and prior.seconds < there.seconds < here.seconds and "none on the H100" in there.basis
    assert width(here) < width(there) < width(prior)
    assert own.estimate(1.0, card, receipts.shipped()) == prior  # other tools say nothing of this one


@pytest.mark.long
def test_every_family_on_every_card_and_placement():
    """Seconds of this program and of both tools, above 0 and more where experts come over the bus."""
    several = [name for name in PRESETS if not name.endswith("-tiny")]
    assert {type(PRESETS[name]) for name in several} == set(FAMILIES.values())
    law = fitted.points(receipts.shipped(), gpus.GPUS).fit()
    for name in several:
        sizes = PRESETS[name]
        adapter = {"adapter": {}, "quantization": {"format": "none" if sizes.expert_format else "nf4"}}
        data = {"batching": "fixed", "row_tokens": 512, "max_length": 512}
        given = {"name": "x", "model": {"preset": name}, "data": data, "training": {"steps": 1, "compute_dtype": "bfloat16"}, **adapter}
        for gpu in gpus.GPUS.values():
            seconds = []
            for where in ("device", "host"):
                experiment = config.of(given, "x", {"placement.experts": where}).with_defaults(sizes)
                job = workload.of(experiment, sizes, lengths.constant(100, 500))
                tools = [forecast.recipe(job, tool, None) for tool in forecast.OTHERS]
                seconds.append([own.program_seconds(experiment, sizes, gpu, 1, 512), *law.seconds(tools, [gpu] * len(tools))])
            assert all(0 < here <= there < 1e4 for here, there in zip(*seconds, strict=True)), (name, gpu.name, seconds)


def test_own_receipts_answer_for_their_card(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(run("A40", 2.0).model_dump_json())
    given = ["predict", "--model", "olmoe-1b-7b", "--records", "90", "--length", "90", "--batch", "2", "--gpu", "A40,H100", "--receipts"]
    assert cli.estimate_main([*given, str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "A40: a roofline of the program, fitted to 1 of your runs on this card" in out and "│ A40 │" in out and "│ H100 * │" in out


@pytest.mark.parametrize(
    ("gpu", "shape", "derived"),
    [("H100", "1x128", 0.0855), ("A100-80", "1x128", 0.145), ("RTX-5090", "1x128", 0.1335), ("L4", "1x128", 0.485),
     ("H100", "8x512", 0.6948), ("A100-80", "8x512", 2.0787)],
)  # fmt: skip
def test_codes_decoded_in_the_product_are_counted(gpu, shape, derived):
    """Next to the seconds of the compiled program (benchmarks/results/2026-12-01-one-graph.json), to which nothing is fitted."""
    rows, tokens = shape.split("x")
    size = f"data.batch_rows={rows}", f"data.row_tokens={tokens}", f"data.max_length={tokens}"
    decode, loop = (program("mixtral_8x7b_cs_sparse", gpu, *size, f"model.moe_backend={by}") for by in ("decode", "loop"))
    assert decode == pytest.approx(derived, rel=0.25) and decode < loop
