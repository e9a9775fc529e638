"""Other tools' steps: the counts of their methods against what was published of them, the fit, and how far it holds."""

from dataclasses import replace

import numpy as np
import pytest

from moejax import cli, gpus
from moejax.estimator import receipts
from moejax.estimator.tools import fitted, forms, peak, work
from moejax.models.config import PRESETS


@pytest.fixture(scope="module")
def data():
    return fitted.points(receipts.shipped(), gpus.GPUS)


def recipe(data, name):
    return next(r for r, receipt in zip(data.recipes, data.receipts, strict=True) if receipt.id == name)


def test_counts_are_those_that_were_published(data):
    qwen, mixtral = PRESETS["qwen3-30b-a3b"], PRESETS["mixtral-8x7b"]
    assert work.adapter_weights(qwen, 16) == pytest.approx(642.5e6, rel=1e-4)  # "642.5 M trained"
    quantized = sum(b * (m.copies or 1) * m.out * m.inner for path, (m, b) in mixtral.linears.items() if path[-1] != "router")
    assert quantized // 2 == 23219666944  # "NF4 code bytes hashed on the card"
    assert work.work(recipe(data, "tc1-unsloth-5090"), gpus.find("RTX-5090")).visits == pytest.approx(48 * 128, rel=1e-3)
    grouped = work.work(recipe(data, "tc1c-unsloth-h100"), gpus.find("H100-NVL"))
    assert grouped.visits_without_grouped == 0 < grouped.visits  # torch has the kernel there


def test_versions_and_tokens_that_were_not_published_are_those_of_the_same_session(data):
    assert recipe(data, "tp2-e4b-qwen3").version == "0.35.1" and recipe(data, "tc3-e4b-a2000").version is None
    assert recipe(data, "olmoe-e4b").row_tokens == pytest.approx(recipe(data, "tc1c-e4b-h100").row_tokens)
    assert work.version_number("0.9") < work.version_number("0.35.1") < work.version_number("0.46") < work.version_number("1.0")
    assert work.version_number("2026.9.2") < work.version_number("2026.9.14") < work.version_number("2026.10.1")


def test_the_fit_knows_versions_and_cards(data):
    law = data.fit()
    old, new = (recipe(data, name) for name in ("tp2-e4b-qwen3", "tc1-e4b-5090"))
    card = gpus.find("RTX-5090")
    seconds = law.seconds([old, new], [card, card])
    # 4.1 s for one micro-batch of one row by one version, 3.5 s for four of two longer rows by a later one.
    assert seconds[0] > 2 * seconds[1] / new.accumulation
    faster = law.seconds([new, new], [gpus.find("RTX-4090"), gpus.find("B200")])
    assert faster[0] > seconds[1] > faster[1]


def test_more_work_takes_longer(data):
    law, card, base = data.fit(), gpus.find("A100-80"), recipe(data, "tc2-unsloth")
    more = [replace(base, rows=8), replace(base, padded_tokens=2000.0), replace(base, in_host=True), replace(base, accumulation=8)]
    seconds = law.seconds([base, *more], [card] * 5)
    assert (seconds[1:] > seconds[0]).all()


def test_peaks(data):
    found = peak.peaks(receipts.shipped(), gpus.GPUS)
    assert np.median(np.abs(np.expm1(found.left_out()))) <= 0.08
    qwen = recipe(data, "tc1-unsloth-5090")
    assert peak.stored_gb(qwen) == pytest.approx(24.27, rel=0.01)  # nothing fitted


def test_what_is_novel(data):
    asked = recipe(data, "tc1-unsloth-5090")
    names = {data.novel(asked, gpus.find(name)) for name in ("RTX-5090", "H100-NVL")}
    assert names == {"neither"} and data.novel(asked, gpus.find("L40S")) == "card"
    other = replace(asked, model="glm-4.7-flash", config=PRESETS["glm-4.7-flash"])
    assert data.novel(other, gpus.find("RTX-5090")) == "model" and data.novel(other, gpus.find("A40")) == "both"


def test_half_widths_are_conformal():
    assert fitted.half_width(np.linspace(-1, 0.9, 20)) == pytest.approx(0.9)  # the 19th of 20


@pytest.mark.long
def test_the_bars(data):
    """Each receipt by all the others: median error of seconds, and how many lie in their intervals of 90 %."""
    chosen = fitted.score(data, forms.FORM)
    assert chosen.left_out <= 0.35
    assert min(fitted.score(data, form).mean for form in forms.FORMS) == chosen.mean  # by which it was chosen
    inside = [low <= seconds <= high for _, seconds, (low, high) in fitted.held(data)]
    assert sum(inside) / len(inside) >= 0.85


@pytest.mark.long
@pytest.mark.parametrize("tool", ["unsloth", "e4b"])
def test_predict_of_another_tool(tool, capsys):
    config = ["olmoe_1b_7b", "qwen3_30b_a3b_80gb", "gpt_oss_20b", "glm_4.7_flash_24gb"]
    for name in config:
        given = ["predict", f"configs/{name}.yaml", "--tool", tool, "--gpu", "H200,B200", "--records", "1000", "--length", "190"]
        assert cli.estimate_main(given) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"Times are those of {tool}") and "B200 *" in out and "spread between cards and models" in out


def test_contradictory_receipts_widen_the_interval():
    """Both stay in the fit, and half of what lies between them is added on either side."""
    one = next(r for r in receipts.shipped() if r.id == "tc2-unsloth")
    again = one.model_copy(update={"id": "again", "step_seconds": 2 * one.step_seconds, "source": "another page"})
    apart = fitted.Fitted(fitted.points([*receipts.shipped(), again], gpus.GPUS))
    asked, card = recipe(apart.points, "again"), gpus.find("RTX-5090")
    assert len(apart.points) == 21 and apart._contradicted(asked, card) == pytest.approx(np.log(2) / 2)
    alone = fitted.Fitted(fitted.points(receipts.shipped(), gpus.GPUS))
    assert alone._contradicted(asked, card) == 0 == apart._contradicted(asked, gpus.find("H100"))
