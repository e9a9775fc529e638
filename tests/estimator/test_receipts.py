"""Receipts as data: what is read, what is refused, and what contradicts."""

import json

import pytest

from moejax import cli, gpus
from moejax.errors import UserError
from moejax.estimator import receipts

ONE = {
    "id": "mine", "model": "olmoe-1b-7b", "tool": "Unsloth 2026.9.14", "tool_name": "unsloth", "tool_version": "2026.9.14", "gpu": "4090",
    "weights": "nf4", "experts_in": "device", "lora_rank": 16, "targets": "attention+experts", "optimizer": "adamw_8bit", "micro_batch": 2,
    "accumulation": 4, "row_tokens": "alpaca", "row_tokens_mean": 190, "step_seconds": 2.0, "peak_gb_allocator": 6.1, "source": "mine",
}  # fmt: skip


def write(folder, name="mine.json", **changes):
    (folder / name).write_text(json.dumps({key: value for key, value in (ONE | changes).items() if value is not ...}))
    return folder


def test_those_that_come_with_the_package():
    found = receipts.shipped()
    assert len(found) == 22 and all(r.gpu is None or r.gpu in gpus.GPUS for r in found)
    cards = {r.gpu for r in found if r.step_seconds}
    assert cards == {"RTX-5090", "RTX-4090", "RTX-A2000-12", "H100-NVL", "H100"}
    assert {r.campaign for r in found if r.id in ("tp2-unsloth", "tp2-unsloth-qwen3")} == {("unsloth", "tp2")}
    assert next(r for r in found if r.id == "olmoe-e4b").campaign == ("e4b", "tc2")  # of a file in that folder


def test_a_users_own(tmp_path):
    write(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    write(tmp_path / "runs" / "a", receipts.RECEIPT, id="a")
    (tmp_path / "runs" / "a" / "prediction.json").write_text("{}")  # a run's other files are none
    own = receipts.with_own(str(tmp_path))[22:]
    assert [r.id for r in own] == ["mine", "a"] and own[0].gpu == "RTX-4090" and own[0].rows == 8


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"step_seconds": ..., "step": 2.0}, "step = 2.0 has no unit that is known here: expected step_seconds"),
        ({"peak_gb_allocator": ..., "peak": 6.1}, "expected peak_gb_allocator"),
        ({"step_seconds": "2 s"}, "expected a number alone, in the unit of its name"),
        ({"step_seconds": -1.0}, "step_seconds = -1.0"),
        ({"gpu": "RTX-5091"}, "did you mean RTX-5090"),
        ({"tool_name": ...}, "tool_name is missing"),
        ({"lora_rnk": 4}, "did you mean lora_rank?"),
    ],
)
def test_what_is_refused(tmp_path, changes, told):
    with pytest.raises(UserError, match=r"mine\.json, receipt 1 \(mine\): ") as error:
        receipts.of_folder(write(tmp_path, **changes))
    assert told in str(error.value)


def test_no_folder_and_an_empty_one(tmp_path):
    for place, told in ((tmp_path / "none", "does not exist"), (tmp_path, "holds no receipt")):
        with pytest.raises(UserError, match=told):
            receipts.of_folder(place)


def test_contradictory_receipts_both_stay(tmp_path):
    write(write(tmp_path), "again.json", id="again", step_seconds=3.0, tool="Unsloth", source="another page")
    own = receipts.of_folder(tmp_path)
    assert len(own) == 2 and [[r.id for r in group] for group in receipts.contradictions(own)] == [["again", "mine"]]
    assert not receipts.contradictions(own, "peak_gb_allocator")


def test_the_command(capsys, tmp_path):
    write(tmp_path)
    assert cli.estimate_main(["receipts", "--receipts", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pair = [["tp2-e4b-offload-fused", "tp2-e4b-offload-reference"]]
    assert len(found["receipts"]) == 23 and found["contradictions"]["step_seconds"] == pair
    assert cli.estimate_main(["receipts", "--tool", "e4b"]) == 0
    out = capsys.readouterr().out
    assert "12 receipts" in out and "2.377 s and 2.929 s; both stay" in out
