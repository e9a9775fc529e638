"""What a run logs: one point for each step, whatever was cut off."""

import json
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from moejax.training.events import tag
from moejax.training.metrics import MetricWriter

EXPERIMENT = SimpleNamespace(logging=("tensorboard",))


def points(folder):
    """(step, loss) of all event files, in their order."""
    return [
        (event.step, round(value.tensor.float_val[0], 3))
        for file in sorted(folder.glob("events.out.tfevents.*"))
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_a_killed_run_goes_on_without_a_repeated_point(tmp_path, cut):
    """The steps after the checkpoint are trained again; the last record is whole, or `cut` bytes short."""
    first = MetricWriter(tmp_path, EXPERIMENT)
    for step in (1, 2, 3, 4):
        first.write(step, {"loss": 1 / step})
    first.close()
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[: -cut or None])
    second = MetricWriter(tmp_path, EXPERIMENT, resume_step=2)
    for step in (3, 4):
        second.write(step, {"loss": 1 / step + 1e-3})
    second.close()
    assert points(tmp_path) == [(1, 1.0), (2, 0.5), (3, 0.334), (4, 0.251)]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_the_first_card_of_tensorboard_is_the_loss():
    """It sorts tags by name."""
    names = [
        "epoch", "loss", "aux_loss", "learning_rate", "eval_loss", "eval/loss", "eval/accuracy", "device_peak_bytes", "tokens_per_second",
        "expert_load_variance/layer_1", "rewards/chosen", "logps/chosen", "eval_rewards/chosen", "eval_logps/chosen", "grad_norm",
    ]  # fmt: skip
    tags = sorted(tag(name) for name in names)
    assert tags[:2] == ["loss/evaluation", "loss/train"] and len(set(tags)) == len(names)
    assert {t.split("/")[0] for t in tags} == {"loss", "memory", "rewards", "router", "score", "speed", "training"}
