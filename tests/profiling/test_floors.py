"""benchmarks/floors.py beside a profiled run: every measured second in one row, beside the floor of its stage."""

import json
import sys

import pytest
from support import ROOT

sys.path[:0] = [str(ROOT / "benchmarks")]

import floors  # noqa: E402

from moejax import config  # noqa: E402

TINY = str(ROOT / "configs" / "bench_mixtral_tiny.yaml")


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["floors.py", *map(str, arguments)])
    code = floors.main()
    return code, *capsys.readouterr()


@pytest.fixture
def breakdown(tmp_path):
    """What `moejax breakdown --json` prints of one run: a second for w1, two for w3, half of one for what has no floor."""

    def write(*, stages=(("moe/w1", 1.0), ("moe/w3", 2.0), ("attention", 4.0), ("attention/dequant", 8.0), ("moe/topk", 0.5)), runs=1):
        peaks = {"flops_per_second": 1e11, "bytes_per_second": 1e10}
        one = {"stages": [{"name": n, "seconds": s} for n, s in stages], "idle": 0.25, "peaks": peaks}
        path = tmp_path / "breakdown.json"
        path.write_text(json.dumps([one] * runs))
        return path

    return write


def test_every_measured_second_stands_beside_its_floor(breakdown, capsys, monkeypatch):
    arguments = ("--measured", breakdown(), "--config", TINY, "--shapes", "10x128")
    code, out, _ = run(capsys, monkeypatch, *arguments, "--json")
    rows = {row["stage"]: (row["floor_seconds"], row["seconds"]) for row in json.loads(out)}
    assert code == 0 and sum(spent for _, spent in rows.values()) == 15.75
    assert rows["moe/w1, w3, w2"][1] == 3.0 and rows["no floor: moe/topk"] == (None, 0.5) and rows["no floor: idle"] == (None, 0.25)
    experiment = config.load(TINY)
    stages = {s.name: s for s in floors.floors(experiment, experiment.model.architecture(None), 10, 128)}
    # One name in the profile, two floors: the products' and the scores'. The run's own rates.
    both = sum(max(stages[n].flops / 1e11, stages[n].bytes / 1e10) for n in ("attention: projections", "attention: scores"))
    assert rows["attention: projections and scores"] == (pytest.approx(both), 4.0)
    code, out, _ = run(capsys, monkeypatch, *arguments, "--gb-per-second", "20", "--tflops", "0.2")
    assert "10x128: floor at 0.2 TFLOP/s and 20 GB/s" in out and "| no floor: moe/topk |  | 500.00 |  |" in out
    assert f"| attention: projections and scores | {1e3 * both / 2:.2f} | 4000.00 | {8 / both:.1f} |" in out


def test_the_floor_of_a_run_in_fp32_moves_twice_the_bytes():
    loaded = {dtype: config.load(TINY, [f"training.compute_dtype={dtype}"]) for dtype in ("float32", "bfloat16")}
    moved = {d: {s.name: s.bytes for s in floors.floors(e, e.model.architecture(None), 10, 128)} for d, e in loaded.items()}
    for name in ("moe/w1, w3, w2", "moe/act", "attention: projections", "norms, stream", "loss"):
        assert moved["float32"][name] == 2 * moved["bfloat16"][name]
    assert moved["float32"]["optimizer"] == moved["bfloat16"]["optimizer"]


def test_a_profiled_runs_folder_says_all_itself(profiled, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "--measured", profiled.folder)
    assert code == 0 and "GB/s" in out and "780" not in out and "| optimizer |" in out and "| **all**" not in out


def test_what_is_no_profile_is_told(breakdown, tmp_path, capsys, monkeypatch):
    def refused(path, *arguments):
        code, _, said = run(capsys, monkeypatch, "--measured", path, *arguments)
        assert code == 2
        return said

    assert "of one run, found 2" in refused(breakdown(runs=2))
    assert "say what was run, with --config FILE and --shapes" in refused(breakdown())
    assert "there is no trace, so no stage's time is known" in refused(breakdown(stages=()))
    (tmp_path / "x.json").write_text("{}")
    assert "expected a profiled run's folder" in refused(tmp_path / "x.json")
    assert "expected a profiled run's folder" in refused(tmp_path / "none.json")


def test_a_trained_base_is_multiplied_once_more():
    """Whatever its mixer; and only adapted experts have an adapter's products."""
    for file, mixer in ((TINY, "attention: projections"), (TINY.replace("mixtral", "blackmamba"), "mamba: projections")):
        full, adapted = (config.load(file, ["quantization.format=none", more]) for more in ("adapter=null", "adapter.targets=[gate]"))
        flops = [{s.name: s.flops for s in floors.floors(e, e.model.architecture(None), 10, 128)} for e in (full, adapted)]
        assert flops[0]["moe/w1, w3, w2"] == 11 / 8 * flops[1]["moe/w1, w3, w2"] and "moe/lora" not in flops[1]
        assert flops[0][mixer] > 1.3 * flops[1][mixer]
