"""What of a card's memory stays free, before and after runs on it."""

import pytest

from moejax.estimator import margin
from moejax.estimator.receipts import Receipt


def run(measured, predicted=20.0, gpu="L4", jax="0.10.2", tool="moejax"):
    return Receipt(
        id="run", model="m", tool=tool, tool_name=tool, gpu=gpu, weights="nf4", experts_in="device", source="a run",
        peak_gb_allocator=measured, predicted={"peak_gb_allocator": predicted}, versions={"jax": jax},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("receipts", "share"),
    [
        ([], 0.03),
        ([run(20.2)], 0.03),  # one run that took 1 % more does not make the assumption smaller
        ([run(21.0)], 0.055),
        ([run(20.2), run(20.0), run(19.9)], 0.015),
        ([run(20.0)] * 3, 0.005),
        ([run(19.0)] * 3, 0.005),
        ([run(22.0, gpu="H100"), run(22.0, jax="0.11.0"), run(22.0, tool="unsloth"), run(None)], 0.03),
    ],
)
def test_the_margin(receipts, share):
    found = margin.of_card("L4", "0.10.2", receipts)
    assert found.share == pytest.approx(share)
    assert ("as assumed" in found.why) == (share == 0.03 and len(receipts) != 1)
