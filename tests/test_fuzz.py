"""A few damaged files for each reader; 20,000: `make soak`."""

import fuzz
import pytest


@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged_files_are_read_or_refused_by_name(name):
    counts, faults = fuzz.fuzz(name, 25, seed=0)
    assert not faults and sum(counts.values()) == 25 and counts["refused"]


def test_what_escapes_a_reader_is_a_fault(monkeypatch):
    """A traceback, a message without its file, and what does not end."""
    reader = fuzz.READERS["prices"]

    def broken(folder):
        kind = (folder / "prices.csv").stat().st_size % 3
        while kind == 0:
            pass
        raise (ValueError, fuzz.UserError)[kind - 1]("no file is named")

    monkeypatch.setattr(fuzz, "SECONDS", 0.01)
    monkeypatch.setitem(fuzz.READERS, "prices", fuzz.Reader(reader.seeds, reader.target, broken))
    faults = fuzz.fuzz("prices", 30, seed=0)[1]
    assert {where.partition(" at ")[0] for where in faults} == {"ValueError", "message without its file", "Slow"}
