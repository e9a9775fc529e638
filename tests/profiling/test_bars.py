"""The takeaways, the command and what it draws."""

import json
import struct
import xml.etree.ElementTree as ET

import pytest
from support import VECTORS

from moejax import cli
from moejax.commands import breakdown
from moejax.profiling.bars import Bars, takeaways

TRACE = str(VECTORS / "mixtral-cpu.xplane.pb.gz")


def test_takeaways_are_computed():
    bars = Bars(
        "made up",
        {"forward": 2.0, "recompute": 1.0, "backward": 6.0, "optimizer": 1.0},
        {"moe": 6.0, "norm": 2.0, "optimizer": 1.0},
        {"moe/w1": 3.0, "moe/w1_dequant": 1.0, "moe/act": 2.0},
    )
    assert takeaways(bars) == {
        "MoE, of the layers' time": 0.75,
        "matrix products, of the MoE's time": 0.5,
        "dequantization, of the MoE's time": 1 / 6,
        "optimizer, of the step": 0.1,
        "backward with recomputation / forward": 3.5,
        "recomputation, of the step": 0.1,
    }


def test_the_command_draws_and_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["breakdown", TRACE, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 traced steps of jit_step on a CPU" in out and "moe/w1_dequant" in out
    assert "study: Mixtral-8x7B on an A40, sparse, batch 32" in out
    for name in ("phases", "layers", "moe_kernels"):
        png = (tmp_path / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert png.startswith(b"\x89PNG") and width > 600 and height > 400
        assert ET.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")


@pytest.fixture
def undrawn(monkeypatch):
    """For what is printed alone."""
    monkeypatch.setattr(breakdown, "draw", lambda bars, folder: [])


@pytest.mark.parametrize("columns", [80, 200])
def test_nothing_is_cut_in_a_narrow_terminal(columns, tmp_path, capsys, monkeypatch, undrawn):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["breakdown", TRACE, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "…" not in out and ("recompute ┃ backward" in out) == (columns == 200)


def test_json_says_what_the_tables_say(capsys):
    assert cli.main(["breakdown", TRACE, "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert run["steps"] == 2 and run["attributed"] >= 0.95
    assert sum(run["phases"].values()) == pytest.approx(run["busy_seconds"])
    assert {s["name"] for s in run["stages"]} >= {"moe/w1", "attention", "loss"}


def test_a_run_of_another_framework_is_drawn_from_its_profile(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # names in one line
    from moejax.profiling import schema

    unknown = dict.fromkeys(("peak_flops", "peak_bytes_per_second", "peaks_measured", "memory_bytes"))
    profile = schema.StepProfile(
        schema_version=2,
        framework="pytorch",
        versions={"torch": "2.13.0"},
        device=schema.Device(name="CPU", **unknown),
        model=schema.ModelCounts(name="mixtral", params_total=None, params_active=None, params_trainable=None),
        method="lora",
        precision="float32",
        remat="full",
        moe=schema.Moe(experts=8, top_k=2, backend="eager"),
        batch=schema.Batch(**(dict.fromkeys(schema.Batch.model_fields) | {"batching": "fixed"})),
        step_seconds=schema.StepSeconds(median=1.0, p10=None, p90=None, n=3),
        compile_seconds=None,
        memory=schema.Memory(**dict.fromkeys(schema.Memory.model_fields)),
        phases=schema.Phases(forward=0.4, recompute=0.1, backward=0.4, optimizer=0.1, other=None, collectives=None, idle=0.0),
        layers={"moe": 0.7, "attention": 0.2},
        moe_kernels={"moe/w1": 0.4, "moe/dispatch": 0.1},
        cost=None,
        expert_load=None,
        devices=1,
        mode=None,
        collectives=None,
    )
    folder = tmp_path / "torch-run"
    folder.mkdir()
    schema.write(profile, folder / schema.FILE_NAME)
    assert cli.main(["breakdown", TRACE, str(folder), "--out", str(tmp_path / "figures")]) == 0
    assert "(pytorch)" in capsys.readouterr().out
    assert (tmp_path / "figures/moe_kernels.svg").is_file()
    # PyTorch chooses and dispatches with k = E too: k says which of the study's bars stand next to, not the stages.
    monkeypatch.setattr(breakdown, "draw", lambda bars, folder: [])
    for k, beside in ((2, "sparse, batch"), (8, "dense, batch")):
        schema.write(profile.model_copy(update={"moe": schema.Moe(experts=8, top_k=k, backend="eager")}), folder / schema.FILE_NAME)
        assert cli.main(["breakdown", str(folder), "--out", str(tmp_path / "figures")]) == 0
        out = capsys.readouterr().out
        assert all((kind in out) == (kind == beside) for kind in ("sparse, batch", "dense, batch"))
    # The study has no model of 128 experts: nothing of it stands next to one.
    schema.write(profile.model_copy(update={"moe": schema.Moe(experts=128, top_k=8, backend="eager")}), folder / schema.FILE_NAME)
    assert cli.main(["breakdown", str(folder), "--out", str(tmp_path / "figures")]) == 0
    assert "study:" not in capsys.readouterr().out
    assert cli.main(["breakdown", str(folder), "--reference", "all", "--out", str(tmp_path / "figures")]) == 0
    assert "study: Mixtral-8x7B" in capsys.readouterr().out
    schema.write(profile.model_copy(update={"phases": None}), folder / schema.FILE_NAME)
    assert cli.main(["breakdown", str(folder)]) == 2
    assert "holds no phases and there is no trace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "no such run"),
        ("broken.xplane.pb", b"not a trace", "is no whole trace"),
        ("broken.json", b"{", "no whole JSON"),
    ],
)
def test_bad_input_is_one_message(name, content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert cli.main(["breakdown", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err


def test_a_trace_of_pytorch_is_read_too(tmp_path, capsys):
    assert cli.main(["breakdown", str(VECTORS / "torch-mixtral.json.gz"), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "torch-mixtral (pytorch)" in out and "recompute" in out and (tmp_path / "moe_kernels.svg").is_file()
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes((VECTORS / "torch-mixtral.json.gz").read_bytes()[:5000])
    assert cli.main(["breakdown", str(cut)]) == 2
    assert f"{cut} is no trace of torch.profiler, or is cut off" in capsys.readouterr().err
