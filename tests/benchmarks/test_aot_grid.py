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


def test_by_default_each_config_is_compiled_as_it_is_and_the_studys_at_its_batches():
    found = aot_grid.programs()
    study = aot_grid.chosen(found["mixtral_8x7b"])
    assert [study[gpu] for gpu in aot_grid.CARDS] == [[(1, 2048, 32)]] * 3  # its config names no card
    assert {gpu: sorted(study[gpu]) for gpu in study if gpu not in aot_grid.CARDS} == {
        "A100-40": [(3, 1024, 2), (6, 512, 2)], "A40": [(4, 1024, 2), (8, 512, 2)], "A100-80": [(17, 1024, 2), (27, 512, 2)],
    }  # fmt: skip
    assert aot_grid.chosen(["mixtral_8x7b_8gb"])["RTX-4060"] == [(1, 4096, 32)]
    assert set(aot_grid.chosen(["qwen3_30b_a3b_24gb"])) == set(aot_grid.CARDS)  # an L4 has 24 GB
    assert aot_grid.chosen(["demo"]) == {"H100": [(8, 192, 4)]}
    shapes = sum(len(cells) for same in found.values() for cells in aot_grid.chosen(same).values())
    assert shapes < 4 * len(found)


def test_every_shape_is_of_whole_rows():
    made = aot_grid.grid("mixtral_8x7b_cs_sparse", "H100")
    assert len(made) == 19 and made[0] == (2, 368, 2) and made[-1] == (1, 2048, 32)
    elsewhere = [aot_grid.grid("mixtral_8x7b_cs_sparse", gpu)[:-1] for gpu in ("A100-80", "A40", "RTX-5090")]
    assert [len(c) for c in elsewhere] == [6, 6, 6] and len({cell for some in elsewhere for cell in some}) == 18  # each pair on one of them
    assert aot_grid.grid("demo", "H100") == [(2, 368, 2), (8, 192, 4)]
    assert all(n % 16 == 0 for n in aot_grid.LENGTHS)


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
