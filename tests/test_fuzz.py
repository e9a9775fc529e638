"""A few damaged files for each reader, in a process whose memory is limited; 20,000: `make soak`."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

COUNT = 25


@pytest.fixture(scope="module")
def said():
    """Reader -> what `python tests/fuzz.py` says of it, in order."""
    command = [sys.executable, fuzz.__file__, "--mutations", str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if not line.startswith(" "))


@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged_files_are_read_or_refused_by_name(name, said):
    counts = re.fullmatch(r"(\d+) read, (\d+) refused, 0 faults in 0 places", said[name])
    assert counts, said[name]
    assert int(counts[1]) + int(counts[2]) == COUNT and int(counts[2])


def test_what_escapes_a_reader_is_a_fault(monkeypatch):
    """A traceback, a message without its file, what does not end, and what takes more memory than there may be."""
    reader = fuzz.READERS["prices"]

    def broken(folder):
        kind = (folder / "prices.csv").stat().st_size % 4
        while kind == 0:
            pass
        if kind == 1:
            bytearray(1 << 30)
        raise (ValueError, fuzz.UserError)[kind - 2]("no file is named")

    monkeypatch.setattr(fuzz, "SECONDS", 0.01)
    monkeypatch.setitem(fuzz.READERS, "prices", fuzz.Reader(reader.seeds, reader.target, broken))
    before, held = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (held * resource.getpagesize() + (1 << 29), before[1]))
    try:
        _, faults = fuzz.fuzz("prices", 20, seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert {where.split(" at ")[0] for where in faults} == {"ValueError", "Slow", "MemoryError", "message without its file"}
