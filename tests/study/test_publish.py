"""What the tool holds of the paper is what the study writes."""

import json

import numpy as np
import pytest

from moejax.estimator import coefficients, published
from moejax.profiling import bars
from moejax.profiling.bars import ALL, study
from moejax.study import publish, reference


def test_the_tools_data_is_the_papers(tmp_path):
    publish.main(tmp_path, tmp_path)
    for file in (published.FOLDER / "lengths.json", published.FOLDER / "batches.json", bars.STUDY):
        assert json.loads((tmp_path / file.name).read_text()) == json.loads(file.read_text()), file
    for made, kept in zip(coefficients.read(tmp_path / "coefficients.json"), coefficients.study(), strict=True):
        assert (made.model, made.method, made.gpu, made.points, made.range) == (kept.model, kept.method, kept.gpu, kept.points, kept.range)
        for name in ("coefficients", "samples", "scatter"):  # another machine's linear algebra differs in the last digits
            np.testing.assert_allclose(getattr(made, name), getattr(kept, name), rtol=1e-6, atol=1e-12)


def test_the_studys_bars():
    found = study("mixtral", "sparse")
    assert [b.name for b in found] == [f"study: Mixtral-8x7B\non an A40,\nsparse, batch {n}" for n in (1, 10, 32)]
    row = reference.kernel_microseconds().row("mixtral", "sparse", 32).values
    assert found[2].kernels["moe/w1"] == pytest.approx(row["matmul(w1)"] * 1e-6)
    assert found[2].kernels["moe/router"] == pytest.approx((row["softmax"] + row["matmul(router)"]) * 1e-6)
    assert sum(found[2].kernels.values()) == pytest.approx(sum(row.values()) * 1e-6)
    layers = reference.layer_seconds().row("mixtral", "sparse", 32).values
    assert found[2].layers["norm"] == layers["input_norm"] + layers["post_attention_norm"]
    assert found[2].utilization["moe/w1_dequant"][0] == reference.sm_percent().row("mixtral", "sparse", 32).values["w1_dequant"] / 100
    assert found[2].utilization[ALL][1] == reference.dram_percent().row("mixtral", "sparse", 32).values["time_weighted"] / 100


def test_the_studys_blackmamba():
    for made in study("blackmamba", "dense"):
        assert made.layers.keys() == {"norm", "mamba", "moe"}
        assert made.kernels.keys() == {"moe/w1", "moe/act", "moe/w2", "moe/topk", "moe/router"}
