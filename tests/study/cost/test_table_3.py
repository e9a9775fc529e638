"""Table III next to ours."""

from support import kept_result

from moejax import gpus
from moejax.estimator import memory
from moejax.study.cost.table_3 import study_cells


def test_every_cell_of_the_study():
    cells = study_cells()
    known = {(c.gpu, c.model, c.kind, c.dataset): c.study for c in cells if c.study is not None}
    assert known["A40", "blackmamba", "sparse", "commonsense_15k"] == 20 and known["A40", "mixtral", "sparse", "math_14k"] == 4
    assert known["A100-80", "mixtral", "sparse", "commonsense_15k"] == 27 and known["A100-40", "mixtral", "dense", "math_14k"] == 1
    assert {c.row_tokens for c in cells} == {512, 1024} and len(cells) == 16


def test_kept_table_3_is_proved_and_at_least_the_studys():
    document = kept_result("table3")
    cells = study_cells()
    assert len(document["cells"]) == len(cells)
    for kept, cell in zip(document["cells"], cells, strict=True):
        same = [kept[name] for name in ("GPU", "model", "kind", "data set", "study")]
        assert same == [cell.gpu, cell.model, cell.kind, cell.dataset, cell.study]
        limit = memory.usable_bytes(gpus.GPUS[cell.gpu], document["memory_fraction"]) / 1e9
        assert kept["by"] == "compiler" and kept["peak GB"] <= limit < kept["one more"]
        assert cell.study is None or kept["ours"] >= cell.study
