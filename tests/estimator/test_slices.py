"""TPU slices: their table, prices and links; bytes a chip by mode; what is refused."""

import json

import pytest

from moejax import cli, installation, tpus
from moejax.errors import UserError
from moejax.estimator import links, prices, slices
from moejax.gpus import GPUS

MAMBA = str(installation.CONFIGS / "blackmamba_2.8b_cs_sparse.yaml")
SPARSE = str(installation.CONFIGS / "mixtral_8x7b_cs_sparse.yaml")
OLMOE = str(installation.CONFIGS / "olmoe_1b_7b.yaml")
PREDICT = (OLMOE, "data.batch_rows=8", "training.remat=full", "--records", "20000", "--length", "400")


def run(capsys, *arguments):
    code = cli.estimate_main([*arguments])
    return code, *capsys.readouterr()


def test_names():
    """By cores, as Google Cloud has it: a v5p's chip has two."""
    known = {name: (s.chip.name, s.count) for name, s in tpus.SLICES.items()}
    assert known == {
        "v5e-1": ("v5e", 1), "v5e-4": ("v5e", 4), "v5e-8": ("v5e", 8), "v6e-1": ("v6e", 1), "v6e-4": ("v6e", 4), "v6e-8": ("v6e", 8),
        "v5p-8": ("v5p", 4),
    }  # fmt: skip
    assert tpus.find("TPU v5e-8") == tpus.find("v5e8") == tpus.SLICES["v5e-8"] and tpus.find("H100") is tpus.find("V100-16") is None
    assert tpus.of(tpus.CHIPS["v5p"], 4).name == links.several("v5p", 4) == "v5p-8" and links.several("L4", 2) == "2 x L4"
    for wrong in ("v5e-16", "tpu v9-8"):
        with pytest.raises(UserError, match=r"unknown TPU .*expected one of v5e-1, v5e-4"):
            tpus.find(wrong)
    with pytest.raises(UserError, match=r"3 TPU chips of v5e: expected one of v5e-1 \(1\), v5e-4 \(4\)"):
        tpus.of(tpus.CHIPS["v5e"], 3)
    assert not set(tpus.CHIPS) & set(GPUS)


def test_prices_and_links():
    """What is lent is lent as a whole; a ring uses two of a chip's links."""
    def best(chip, count):
        return prices.cheapest(prices.DATED, chip, devices=count)

    lent = best("v5e", 8)
    assert lent.told == "free, 20 h a week, Kaggle, 2026-11-29" and best("v5e", 1).told.startswith("free, hours not stated, Colab")
    assert [best(chip, 4).usd_per_hour for chip in ("v5e", "v6e", "v5p")] == [1.2, 2.7, 4.2]
    assert prices.weeks(lent, 20.0) == "20 h are 1 week of Kaggle's 20 h (--resume continues)"
    assert prices.weeks(lent, 57.3).startswith("57.3 h are 3 weeks of") and prices.weeks(best("v5e", 4), 57.3) is None
    rings = [links.between(tpus.CHIPS[chip], n) for chip, n in (("v5e", 8), ("v6e", 8), ("v5p", 4))]
    assert [link.bytes_per_second / 1e9 for link in rings] == [100, 200, 200]


def test_memory_by_mode(capsys):
    """The compiler's figures of these programs: 10.88 and 12.68 GB a chip; the closed form may be 9 % below (docs/tpu.md)."""
    for name, rows, peak in (("v5e-8", 64, 10.88), ("v5e-4", 16, 12.68)):
        asked = ("--gpu", name, "--rows", str(rows), "--seq-len", "512", "--closed-form", "--json")
        code, out, _ = run(capsys, "memory", SPARSE, *asked, "training.remat=full")
        spread, experts, whole = json.loads(out)["gpus"]
        assert code == 0 and [line["gpu"] for line in (spread, experts, whole)] == [f"{name}, {mode}" for mode in slices.MODES]
        assert 0.91 * peak < spread["peak_gb"] < peak and experts["peak_gb"] < spread["peak_gb"]
        assert whole["problem"] is not None and "spread or experts would do" in whole["problem"] and spread["problem"] is None
        assert spread["usable_gb"] == pytest.approx(15.75 * 2**30 / 1e9)
    code, out, _ = run(capsys, "memory", SPARSE, "--gpu", "v6e-1", "--rows", "2", "--seq-len", "512", "--closed-form")
    assert code == 0 and "v6e-1 " in out and "not run (docs/tpu.md)" in out


def test_modes_that_a_config_cannot_have(capsys):
    full = str(installation.CONFIGS / "bench_mixtral_tiny.yaml")
    asked = ("--gpu", "v5e-8", "--seq-len", "32", "--closed-form", "adapter=null", "quantization.format=none", "training.optimizer=adamw")
    code, out, _ = run(capsys, "memory", full, *asked)
    assert code == 0 and "v5e-8, spread: mesh.weights = spread is of frozen weights" in out and "│ v5e-8, whole" in out
    assert "a TPU rounds what it multiplies to bfloat16" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("memory", SPARSE, "--gpu", "v5e-8", "--devices", "4"), "v5e-8 is a slice of 8 chips: expected no --devices"),
     (("memory", SPARSE, "--gpu", "v5e-8", "--placements"), "--placements: no rate of a TPU's link to its host"),
     (("memory", MAMBA, "--gpu", "v6e-1", "model.scan=kernel"), "kernel is for GPUs, and v6e-1 is a TPU: expected auto (there chunked_"),
     (("memory", SPARSE, "--gpu", "v5e-8", "--rows", "9"), "--rows 9: of all 8 devices"),
     (("memory", SPARSE, "--gpu", "v5e-32"), "unknown TPU 'v5e-32'"),
     (("plan", SPARSE, "--gpu", "v5e-8", "data.batch_rows=12"), r"v5e-8 (8 devices) do not divide the step's"),
     (("predict", *PREDICT, "--gpu", "v5e-8", "--tool", "unsloth"), "--tool unsloth: has no receipt of a TPU (v5e-8)"),
     (("predict", "--dataset", "math_14k", "--gpu", "v5e-8", "--tool", "study"), "--gpu v5e-8: a TPU, and these times are of GPUs")],
)  # fmt: skip
def test_mistakes(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err, err


def test_predict_and_plan(capsys):
    code, out, _ = run(capsys, "predict", *PREDICT, "--gpu", "v5e-8,v5p-8", "--epochs", "1000", "--json")
    kaggle, v5p = json.loads(out)["predictions"]
    assert code == 0 and kaggle["devices"] == 8 and kaggle["usd"] == 0 and kaggle["price"]["hours_per_week"] == 20
    assert not kaggle["measured"]
    assert v5p["devices"] == 4 and v5p["price"]["usd_per_hour"] == 4.2 and "nothing of moejax has run on a TPU" in out
    assert kaggle["step_seconds_interval"][1] > 5 * kaggle["step_seconds_interval"][0]
    code, out, _ = run(capsys, "predict", *PREDICT, "--gpu", "v5e-8", "--epochs", "1000")
    assert code == 0 and "weeks of Kaggle's 20 h (--resume continues)" in " ".join(out.split())
    code, out, _ = run(capsys, "plan", OLMOE, "--gpu", "v5e-8", "data.batch_rows=8")
    assert code == 0 and "free, 20 h a week, Kaggle" in out and "mesh.devices=8" in out and "in the host │" not in out.split("━┩")[1]
