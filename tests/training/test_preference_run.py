"""Whole runs of preference training: metrics, gradient accumulation, resuming, and what is shown before."""

import json
import signal
from itertools import pairwise

import numpy as np
import pytest
from support import ROOT
from test_loop import adapter, folder_of, losses, stop_at

from moejax.cli import main
from moejax.config import dump
from moejax.errors import UserError
from moejax.training import dry_run, flops, loop


@pytest.fixture
def make_pairs(make_experiment, tmp_path):
    """make(name, section={…}) -> a run on the bundled problems, each with its answer and that of the next one."""
    problems = json.loads((ROOT / "assets/problems/train.json").read_text())[:40]
    records = [{"question": p["instruction"], "chosen": p["output"], "rejected": q["output"].replace("First", "")}
               for p, q in pairwise(problems)]  # fmt: skip
    (tmp_path / "pairs.json").write_text(json.dumps(records))

    def make(name="run", **sections):
        usual = {
            "preference": {"beta": 0.5},
            "model": {"aux_loss_coef": 0.0},
            "data": {"source": str(tmp_path / "pairs.json"), "template": "mistral", "row_tokens": 144, "max_length": 72, "batch_rows": 2},
            "training": {"steps": 6},
        }
        merged = {key: value | sections.pop(key, {}) for key, value in usual.items()}
        return make_experiment(name, **merged, **sections)

    return make


def lines(experiment, key):
    return [line for text in (folder_of(experiment) / "metrics.jsonl").read_text().splitlines() if key in (line := json.loads(text))]


def test_a_run_prefers_what_was_chosen_and_resumes_to_the_bit(make_pairs, monkeypatch, capsys):
    """6 steps equal 3 and resumed 3, with dropout: every loss, and every byte of the adapter."""
    settings = {"adapter": {"dropout": 0.1}, "training": {"steps": 6, "eval_every": 6}}
    straight, halves = (make_pairs(name, **settings) for name in ("straight", "halves"))
    assert loop.run(straight, resume=False) == 0
    told = capsys.readouterr().out
    assert "no time: coefficients are of supervised training" in told
    before, after = lines(straight, "eval_loss")
    likelier = f"the chosen side is likelier in {100 * before['eval_logps/accuracies']:.1f} %, and has the larger reward in 0.0 %"
    assert f"step 0: evaluation loss 0.6931 over 8 pairs: {likelier}" in told
    assert "pair 1 of 31, chosen, " in told and "pair 1 of 31, rejected, " in told
    assert before["eval_rewards/accuracies"] == 0.0 and after["eval_rewards/accuracies"] > 0.5 and after["eval_loss"] < before["eval_loss"]
    steps = lines(straight, "grad_norm")
    assert steps[0]["loss"] == pytest.approx(np.log(2), rel=1e-6) and steps[-1]["rewards/margins"] > 0
    np.testing.assert_allclose(steps[-1]["rewards/margins"], steps[-1]["rewards/chosen"] - steps[-1]["rewards/rejected"], rtol=1e-4)
    assert steps[0]["logps/chosen"] < 0 and steps[0]["queries"] % 2 == 0 and steps[0]["supervised_tokens"] > 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert loop.run(halves, resume=False) == 128 + signal.SIGTERM
    assert loop.run(halves, resume=True) == 0
    assert losses(folder_of(halves)) == losses(folder_of(straight))
    assert adapter(folder_of(halves)) == adapter(folder_of(straight))


@pytest.mark.long
def test_micro_batches_are_one_batch(make_pairs):
    """A mean over all pairs of the step, however many of them lie in each micro-batch."""
    data = {"shuffle": False, "row_tokens": 288}
    one = make_pairs("one", data=data | {"batch_rows": 2}, training={"steps": 2, "gradient_accumulation": 1})
    two = make_pairs("two", data=data | {"batch_rows": 1}, training={"steps": 2, "gradient_accumulation": 2})
    for experiment in (one, two):
        assert loop.run(experiment, resume=False) == 0
    for a, b in zip(lines(one, "grad_norm"), lines(two, "grad_norm"), strict=True):
        assert a["queries"] == b["queries"]
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-7)


def test_what_is_shown_before(make_pairs, tmp_path, capsys):
    experiment = make_pairs(data={"records": 39})
    dry_run.report(experiment)
    told = capsys.readouterr().out
    assert "preference: sigmoid, beta 0.5; the reference is the base with its adapter off" in told and "pair 1 of 31, rejected" in told
    (tmp_path / "c.yaml").write_text(dump(experiment))
    assert main(["data", str(tmp_path / "c.yaml"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["statistics"]["pairs"] == 31 and shown["statistics"]["held out pairs"] == 8
    titles = [example["title"].rpartition(", ")[0] for example in shown["examples"]]
    assert titles == [f"pair {number} of 31, {side}" for number in (1, 16, 31) for side in ("chosen", "rejected")]
    assert all(part["text"].endswith("</s>") for example in shown["examples"] for part in example["parts"] if part["trained"])


def test_losses_and_batches_of_a_callers_own_are_refused(make_pairs):
    import moejax

    with pytest.raises(UserError, match="preference is a loss over pairs of the data section"):
        moejax.train(make_pairs(), loss=lambda *_, **__: None)


def test_the_reference_is_counted_in_a_steps_flops(make_pairs):
    """One forward pass of the base: a third of what a frozen base's training is."""
    from moejax.hub.model import architecture

    sizes = architecture(make_pairs(), None)
    lora = make_pairs().adapter.lora
    with_, without = (flops.count(sizes, lora, reference=reference).step(1000, [9] * 111) for reference in (True, False))
    assert 1.3 < with_ / without < 1.5
