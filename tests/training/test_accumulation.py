"""`training.accumulation`: which order a run takes, what it says, what it refuses."""

import re

import pytest

from moejax.errors import UserError
from moejax.models.config import PRESETS
from moejax.training import accumulation, experts, oracle
from moejax.training.program import Own, TrainProgram

SIZES = PRESETS["mixtral-tiny"]


@pytest.mark.parametrize(
    ("training", "changes", "own", "peak", "chosen", "said"),
    [
        ({}, {}, Own(), 50e9, "layer_major", "each expert's matrices are dequantized once for 2 micro-batches"),
        ({}, {}, Own(), 79e9, "micro_batch_major", "layer_major: 79.0 of 80.0 GB"),
        ({"gradient_accumulation": 1}, {}, Own(), None, "micro_batch_major", "one micro-batch"),
        ({}, {"quantization": {"format": "none"}}, Own(), None, "micro_batch_major", "experts are not in 4 bits"),
        ({}, {}, Own(loss=lambda model, batch, **passed: None), None, "micro_batch_major", "a loss of your own"),
    ],
)  # fmt: skip
def test_auto(training, changes, own, peak, chosen, said, make_experiment, monkeypatch, capsys):
    def peak_bytes(self, rows):
        assert self.experiment.training.accumulation == "layer_major" and self.experiment.training.remat == "full"
        return int(peak)

    monkeypatch.setattr(oracle.Oracle, "peak_bytes", peak_bytes)
    monkeypatch.setattr(accumulation.device, "usable_bytes", lambda: int(80e9))
    experiment = make_experiment(
        training={"accumulation": "auto", "remat": "auto", "gradient_accumulation": 2} | training, **changes
    )
    resolved = accumulation.resolve(experiment, SIZES, 20, own)
    assert resolved == experiment.changed("training", accumulation=chosen)
    assert f"training.accumulation: {chosen} ({said}" in capsys.readouterr().out


def test_nothing_to_do_is_said(make_experiment, capsys):
    experiment = make_experiment(training={"accumulation": "layer_major", "gradient_accumulation": 1})
    assert accumulation.resolve(experiment, SIZES, 20) is experiment
    assert "layer_major changes nothing with one micro-batch" in capsys.readouterr().out


def test_who_sees_one_micro_batch_at_a_time_refuses(make_experiment):
    experiment = make_experiment(training={"accumulation": "layer_major", "gradient_accumulation": 2}, model={"aux_loss_coef": 0.0})
    with pytest.raises(UserError, match=re.escape("layer_major with a loss of your own, which is given one micro-batch at a time")):
        TrainProgram(experiment, SIZES, own=Own(loss=lambda model, batch, **passed: None))


def test_the_experts_plan_is_for_all_micro_batches(make_experiment):
    together = make_experiment(training={"accumulation": "layer_major", "gradient_accumulation": 4})
    apart = together.changed("training", accumulation="micro_batch_major")
    assert experts.plan(together, SIZES, 512) == experts.plan(apart, SIZES, 4 * 512) != experts.plan(apart, SIZES, 512)
