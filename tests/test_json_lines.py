"""Logs as a full disk, or a machine that stopped, leaves them."""

import json

import pytest

from moejax import json_lines

WHOLE = [{"step": 0, "eval_loss": 1.5}, {"step": 1, "loss": 0.1}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 3.0}]


@pytest.mark.parametrize("tail", ["", '{"step": 4, "grad_n', "\0\0\0\0", "[4]", '{"loss": 1}', '{"step": "4"}', "\udcff"])
def test_what_is_not_whole_is_dropped_and_told(tail, tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in WHOLE)
    path.write_bytes((text + tail).encode(errors="surrogateescape"))
    assert json_lines.read(path) == (WHOLE, [5] if tail else [])
    told = []
    json_lines.keep_until(path, 2, told.append)
    assert path.read_text() == "".join(f"{line}\n" for line in text.splitlines()[:3])
    assert [line.partition(" (")[0] for line in told] == ([f"warning: {path}: line 5 is not whole"] if tail else [])


def test_a_line_that_lacks_its_end_alone_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste{"step": 2}\n{"step": 3}')
    told = []
    json_lines.keep_until(path, 3, told.append)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n' and "line 2 is not whole" in told[0]
