"""Records of steps in little memory, that read as a list of them."""

import sys

import pytest

from moejax.training.history import History


def test_it_is_a_sequence_of_its_records():
    records = [{"step": step, "loss": 1 / step, "bytes": 2**40 + step} for step in range(1, 8)]
    history = History()
    assert not history and list(history) == [] and history[1:] == []
    for record in records:
        history.append(record)
    assert list(history) == records and history[-1] == records[-1] and history[2:5] == records[2:5] and len(history) == 7
    assert isinstance(history[0]["step"], int)
    with pytest.raises(IndexError):
        history[7]


def test_a_step_takes_eight_bytes_a_number():
    history = History()
    for step in range(10_000):
        history.append({str(name): float(step) for name in range(30)})
    assert sum(map(sys.getsizeof, history._columns.values())) < 10_000 * 30 * 8 * 1.2
