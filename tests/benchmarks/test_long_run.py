"""What a long run is judged by, on made-up measurements."""

import sys

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import long_run

STEPS, MB = 10_000, 10**6


def seen(growth=0, slower=0.0):
    """(steps, resident bytes, CPU seconds) twice a step, of a process that grows by so many bytes and slows by this share over the run."""
    cpu, found = 0.0, []
    for half in range(2 * STEPS):
        step = half // 2
        found.append((step, 600 * MB + growth * step // STEPS - (step < 300) * 100 * MB, cpu))
        cpu += 0.01 * (1 + slower * step / STEPS)
    return [*found, (STEPS, found[-1][1], cpu)]


@pytest.mark.parametrize(
    ("measured", "files", "wrong"),
    [
        ({}, {}, []),
        ({"growth": 10 * MB, "slower": 0.05}, {}, []),
        ({"growth": 20 * MB}, {}, ["memory_growth"]),
        ({"growth": -20 * MB}, {}, ["memory_loss"]),
        ({"slower": 0.2}, {}, ["cpu_drift"]),
        ({}, {"events": 6_000 * STEPS}, ["events"]),
    ],
)
def test_what_grows_is_wrong(measured, files, wrong):
    rows = long_run.windows(seen(**measured), 100)
    assert [row["step"] for row in rows][::50] == [100, 5100] and rows[50]["cpu_ms"] == pytest.approx(20, rel=0.2)
    _, found = long_run.judged(rows, {"metrics.jsonl": 900 * STEPS, "events": 1_800 * STEPS} | files, STEPS)
    assert [text.replace(":", " ").split()[0] for text in found] == wrong
