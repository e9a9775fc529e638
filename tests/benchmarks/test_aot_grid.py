"""The grid of compiles: which programs are one, what a compiler that dies leaves, and what is not compiled again."""

import json
import os
import sys

from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import aot_grid


def test_configs_that_compile_to_the_same_instructions_are_one_program():
    found = aot_grid.programs()
    assert found["mixtral_8x7b"] == ["mixtral_8x7b", "mixtral_8x7b_cs_sparse", "mixtral_8x7b_math_sparse"]
    assert next(iter(found)) == "mixtral_8x7b" and "mixtral_8x7b_cs_dense" in found and "demo" in found
    assert sorted(name for same in found.values() for name in same) == sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))


def test_shapes_are_of_whole_rows_and_the_own_one_is_in_full_depth():
    made = list(aot_grid.cells("mixtral_8x7b_cs_sparse", "H100", [2, 8], [368, 2048], False))
    assert made == [(2, 368, 2), (2, 2048, 2), (8, 368, 2), (8, 2048, 2), (1, 2048, 32)]
    rows, lengths = [2, 1, 8], [int(n) for n in aot_grid.LENGTHS.split(",")]
    elsewhere = [list(aot_grid.cells("mixtral_8x7b_cs_sparse", gpu, rows, lengths, False))[:-1] for gpu in ("A100-80", "A40", "RTX-5090")]
    assert [len(c) for c in elsewhere] == [6, 6, 6] and len({cell for some in elsewhere for cell in some}) == 18  # each pair on one of them
    small = list(aot_grid.cells("demo", "H100", rows, lengths, False))
    assert small[:-1] == [(2, 368, 2)] and small[-1][2] == 4
    assert len(list(aot_grid.cells("demo", "A40", rows, lengths, True))) == 3 * 6 + 1
    assert all(int(n) % 16 == 0 for n in aot_grid.LENGTHS.split(","))


def test_a_compiler_that_dies_costs_one_line(monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, sys\n"
        "for rows, tokens, layers in json.loads(sys.argv[-1]):\n"
        "    print(json.dumps({'begins': [rows, tokens, layers]}), flush=True)\n"
        "    if rows == 2: os.abort()\n"
        "    print(json.dumps({'rows': rows, 'row_tokens': tokens, 'layers': layers, 'peak_gb': 1.0}), flush=True)\n"
    )
    monkeypatch.setattr(aot_grid, "__file__", str(worker))
    lines = list(aot_grid.compiled("demo", "H100", [(1, 16, 2), (2, 16, 2), (3, 16, 2)], ""))
    assert [x["rows"] for x in lines] == [1, 2, 3] and ["error" in x for x in lines] == [False, True, False]
    assert f"({-6 if os.name == 'posix' else ''}" in lines[1]["error"]


def test_what_other_sources_made_is_not_taken_over(tmp_path):
    path = tmp_path / "grid.jsonl"
    line = {"program": "demo", "gpu": "L4", "rows": 1, "row_tokens": 128, "layers": 2, "peak_gb": 0.1, "sources": "a"}
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"rows": 2, "sources": "b"}) + "\n")
    assert list(aot_grid.told_before(path, {"sources": "a"})) == [("demo", "L4", 1, 128, 2)]
    own = line | {"layers": 8, "peak_gb": 0.2}
    assert aot_grid.table([line, line | {"rows": 8, "error": "no"}, own]).splitlines()[-1] == "| demo | 2 of 3, 1 x 128: 0.2 GB |"
