"""What a run logs: one point for each step, whatever was cut off."""

import json
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

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
