"""benchmarks/floors.py: what a step must compute and move, stage by stage."""

import json
import sys

import pytest
from support import ROOT

sys.path[:0] = [str(ROOT / "benchmarks")]

import floors  # noqa: E402

from moejax import config  # noqa: E402
from moejax.estimator.sizes import architecture_of  # noqa: E402

TINY = str(ROOT / "configs" / "bench_mixtral_tiny.yaml")


def test_the_floor_of_a_run_in_fp32_moves_twice_the_bytes():
    loaded = {dtype: config.load(TINY, [f"training.compute_dtype={dtype}"]) for dtype in ("float32", "bfloat16")}
    moved = {d: {s.name: s.bytes for s in floors.floors(e, e.model.architecture(None), 10, 128)} for d, e in loaded.items()}
    for name in ("moe/w1, w3, w2", "moe/act", "attention: projections", "norms, stream", "loss"):
        assert moved["float32"][name] == 2 * moved["bfloat16"][name]
    assert moved["float32"]["optimizer"] == moved["bfloat16"]["optimizer"]


def test_the_table_adds_up_and_takes_the_rates_it_is_given(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["floors.py", "--config", TINY, "--shapes", "10x128", *arguments])
        assert floors.main() == 0
        return capsys.readouterr().out

    found = json.loads(run("--json"))["10x128"]
    assert sum(s["floor_seconds"] for s in found["stages"].values()) == pytest.approx(found["floor_seconds"])
    halved = json.loads(run("--json", "--tflops", "390", "--gb-per-second", "2150"))["10x128"]
    assert halved["floor_seconds"] == pytest.approx(2 * found["floor_seconds"])
    assert "at 0.2 TFLOP/s and 20 GB/s" in run("--tflops", "0.2", "--gb-per-second", "20")


def test_a_shape_that_is_none_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["floors.py", "--config", TINY, "--shapes", "10"])
    assert floors.main() == 2 and "expected rows x tokens, e.g. 8x512" in capsys.readouterr().err


def test_a_trained_base_is_multiplied_once_more():
    """Whatever its mixer; and only adapted experts have an adapter's products."""
    for file, mixer in ((TINY, "attention: projections"), (TINY.replace("mixtral", "blackmamba"), "mamba: projections")):
        full, adapted = (config.load(file, ["quantization.format=none", more]) for more in ("adapter=null", "adapter.targets=[gate]"))
        flops = [{s.name: s.flops for s in floors.floors(e, e.model.architecture(None), 10, 128)} for e in (full, adapted)]
        assert flops[0]["moe/w1, w3, w2"] == 11 / 8 * flops[1]["moe/w1, w3, w2"] and "moe/lora" not in flops[1]
        assert flops[0][mixer] > 1.3 * flops[1][mixer]


def test_what_fits_a_chip_does_not_move():
    """Codes, adapters' matrices and the kept stream do."""
    e = config.load(str(ROOT / "configs" / "gpt_oss_20b.yaml"))
    c = architecture_of(e)
    none, some = ({s.name: s for s in floors.floors(e, c, 2, 512, chip)} for chip in (0, 64 << 20))
    assert some["moe/w1, w3, w2"].bytes == 0 and {n: s.flops for n, s in none.items()} == {n: s.flops for n, s in some.items()}
    codes = 24 * 32 * 3 * 2880 * 2880 * (1 / 2 + 1 / 32)
    assert some["moe: dequantization"].bytes == pytest.approx(2 * codes)
    assert none["moe: dequantization"].bytes == pytest.approx(2 * (codes + 24 * 32 * 3 * 2880 * 2880 * 2))
