"""`moejax tune`: what is wrong, hangs, dies or is slower leaves the portable path; what is chosen is kept, and only where it holds."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT

from moejax import cli, config
from moejax.models.config import PRESETS
from moejax.models.ops import choice, flash
from moejax.models.ops.grouped import matmul
from moejax.training import remat as training_remat
from moejax.tuner import attention, experts, look_up, registry, remat, run, scan, store, trial, trials, use

HERE = Path(__file__).parent
ON = {"device": "cpu", "card": "a CPU", "driver": "", "versions": {"jax": "0.10.2", "moejax": "1"}}


@pytest.fixture
def toy(monkeypatch):
    """The toy operation, registered next to the others with its sabotaged candidates."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setitem(registry.OPERATIONS, "toy", "toy_operation")
    monkeypatch.setattr(registry, "_more", {})
    import toy_operation

    registry.register("toy", toy_operation.sabotaged)
    yield toy_operation
    sys.modules.pop("toy_operation")


@pytest.fixture(autouse=True)
def _nothing_adopted(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    yield
    choice.adopt("cpu", {})


def tiny(**changes):
    return config.load(ROOT / "configs/bench_mixtral_tiny.yaml", [f"{key}={value}" for key, value in changes.items()])


def test_sabotaged_candidates_leave_the_portable_path_and_a_faster_one_wins(toy):
    asked = run.Asked("toy", {"size": 64}, registry.candidates("toy", "cpu", {"size": 64}))
    [site] = run.tune([asked], "cpu", seconds=120)
    found = {one["name"]: one for one in site["tried"]}
    assert {name: one["status"] for name, one in found.items()} == {
        "tomorrow's": "not here", "wrong": "wrong", "hangs": "hung", "dies": "died", "faster": "measured",
    }  # fmt: skip
    assert "result 2 of 2 differs" in found["wrong"]["why"] and "SIGABRT at: building the candidate" in found["dies"]["why"]
    assert site["winner"] == "faster" and site["entry"] == {"form": "faster"} and site["gain"] > 1.05 and site["complete"]
    shown = "\n".join(" ".join(row) for row in run.table([site]).rows)
    assert "hung: not done after 0 s" in shown and "not here: needs another card" in shown
    assert run.gains([site])[0].startswith("toy: faster, ")


@pytest.mark.parametrize(
    ("how", "status", "why"),
    [("unwritten", "wrong", "not finite"), ("restless", "wrong", "other bits"), ("raises", "no room", "RESOURCE_EXHAUSTED")],
)
def test_what_a_child_answers(toy, tmp_path, how, status, why):
    """In this process."""
    portable, candidate = registry.Candidate("portable", {}), registry.Candidate(how, {}, built_by=f"toy_operation:{how}")
    question, answer = tmp_path / "question", tmp_path / "answer"
    question.write_text(json.dumps(trials.request("toy", "cpu", {"size": 64}, portable, candidate)))
    assert trial.main([str(question), str(answer)]) == 0
    found = json.loads(answer.read_text())
    assert found["status"] == status and why in found["why"]


def test_when_the_time_is_over_the_rest_is_not_tried(toy):
    asked = run.Asked("toy", {"size": 64}, registry.candidates("toy", "cpu", {"size": 64}))
    [site] = run.tune([asked], "cpu", seconds=0)
    assert {one["status"] for one in site["tried"]} == {"not here", "not tried"}
    assert site["winner"] == "portable" and not site["complete"] and "not all was tried" in run.gains([site])[0]


@pytest.mark.parametrize(("gain", "winner"), [(1.04, "portable"), (1.06, "other"), (0.5, "portable")])
def test_a_candidate_must_win_by_its_margin(gain, winner):
    tried = [{"name": "other", "margin": 1.05, "entry": {}, "status": "measured", "portable_seconds": gain, "seconds": 1.0}]
    assert run.decided("toy", {}, registry.Candidate("portable", {}), tried)["winner"] == winner


def test_zeros_are_compared_too():
    zeros, some = [np.zeros(3, np.float32)], [np.array([0, 1e-2, 0], np.float32)]
    assert trial.compare("case", zeros, zeros, zeros, 1e-5) == 0
    with pytest.raises(trial.Wrong):
        trial.compare("case", some, some, zeros, 1e-5)
    flat, bump = [np.ones(10_000, np.float32)], [np.ones(10_000, np.float32)]
    bump[0][3] = 1.5
    assert trial.compare("case", bump, bump, flat, 1e-2, norm=True) == pytest.approx(5e-3)
    with pytest.raises(trial.Wrong, match="of its norm"):
        trial.compare("case", bump, bump, flat, 1e-3, norm=True)
    with pytest.raises(trial.Wrong, match="shape"):
        trial.compare("case", [np.zeros(2)], [np.zeros(2)], zeros, 1e-5)


def test_the_shapes_are_the_runs():
    experiment, sizes = use.sizes(tiny(**{"data.batch_rows": 4}))
    [shape] = experts.shapes(experiment, sizes)
    assert (shape["tokens"], shape["rows_per_expert"], shape["rank"], shape["storage"]) == (512, 128, 16, "nf4-double")
    [attended] = attention.shapes(experiment, sizes)
    assert (attended["rows"], attended["length"], attended["head_dim"]) == (4, 128, 64)
    assert look_up.shapes(experiment, sizes) and not scan.shapes(experiment, sizes)
    assert not attention.shapes(tiny(**{"model.attention": "blocks"}), sizes)
    mamba = use.sizes(config.load(ROOT / "configs/bench_blackmamba_tiny.yaml"))
    assert scan.shapes(*mamba) and not attention.shapes(*mamba) and not look_up.shapes(*mamba)


def test_a_tpus_candidates_are_its_own():
    """`ragged` and splash; the scan's kernel and CUDA graphs are a GPU's."""
    experiment, sizes = use.sizes(tiny(**{"training.compute_dtype": "bfloat16"}))
    asked = {one.operation: one for one in run.plan(experiment, sizes, "TPU v5 lite", [], full=True)}
    names = [one.name for one in asked["grouped"].candidates]
    assert names[0].startswith("loop ") and names[-2:] == ["capacity", "ragged"] and "graphs" not in asked
    [flash_there] = [one for one in asked["attention"].candidates if one.name == "flash"]
    assert flash_there.why_not is None
    mamba = use.sizes(config.load(ROOT / "configs/bench_blackmamba_tiny.yaml"))
    [kernel] = [one for one in run.plan(*mamba, "TPU v5 lite", [], full=True)[-1].candidates if one.name == "kernel 16"]
    assert "for GPUs" in kernel.why_not


def remat_shape(**changes):
    experiment, sizes = use.sizes(tiny(**{"training.remat": "auto", "model.preset": "mixtral-tiny", "model.overrides": "{}", **changes}))
    [shape] = remat.shapes(experiment, sizes)
    return experiment, sizes, shape


def test_remat_is_measured_by_the_first_layers_of_the_runs_model():
    experiment, sizes, shape = remat_shape()
    assert remat.whole(shape)[1] == sizes and remat.sliced(shape)[1].blocks == 2
    assert not remat.shapes(experiment.changed("training", remat="full"), sizes)
    assert json.loads(json.dumps(shape)) == shape and "recipe" not in run.told(shape)
    assert [one.name for one in remat.candidates("cpu", shape)] == ["full", "none", "dots"]
    large = config.load(ROOT / "configs/mixtral_8x7b_cs_sparse.yaml", ["training.remat=auto", "data.batch_rows=64"])
    [of_large] = remat.shapes(large, PRESETS["mixtral-8x7b"])
    _, none, dots = remat.candidates("NVIDIA H100 80GB HBM3", of_large)
    assert "GB, by arithmetic" in none.why_not and dots.why_not is None


def test_auto_tries_no_policy_that_is_slower_and_takes_more(monkeypatch):
    """Only for the very model, recipe and shape that was measured."""
    experiment, sizes, shape = remat_shape()
    choice.adopt("cpu", {"remat": [{"digest": shape["digest"], "policy": "dots"}]})
    assert remat.measured(experiment, sizes, "cpu") == "dots"
    pinned = experiment.changed("model", revision="0" * 40, vocabulary=sizes.vocab_size + 2)
    assert remat.measured(pinned, sizes.replace(vocab_size=sizes.vocab_size + 2, new_rows=2), "cpu") == "dots"
    assert remat.measured(experiment.changed("data", batch_rows=11), sizes, "cpu") is None
    assert remat.measured(experiment, sizes.replace(num_layers=3), "cpu") is None
    policies = ("none", "dots", "full", "offload")
    assert remat.not_slower(policies, "dots") == ("dots", "full", "offload") and remat.not_slower(policies, None) == policies
    monkeypatch.setattr(training_remat.oracle.Oracle, "peak_bytes", lambda self, rows: 50)
    chosen, told = training_remat.choose(experiment, sizes, 100)
    assert chosen == "dots" and told == ["dots was fastest when measured here", "dots: 0.0"]


@pytest.mark.long
@pytest.mark.parametrize("preset", ["mixtral-tiny", "blackmamba-tiny"])
def test_remat_policies_are_exact(preset):
    name = f"bench_{preset.replace('-', '_')}"
    small = ["data.batch_rows=2", "data.row_tokens=64", "data.max_length=64", "training.remat=auto", "training.compute_dtype=float32"]
    [shape] = remat.shapes(*use.sizes(config.load(ROOT / f"configs/{name}.yaml", small)))
    full, *others = registry.candidates("remat", "cpu", shape)
    for one in others:
        assert trial.measured(trials.request("remat", "cpu", shape, full, one), lambda stage: None)["status"] == "measured"


def test_quick_tries_fewer_and_what_is_known_is_not_tried_again():
    experiment, sizes = use.sizes(tiny())
    quick, full = (run.plan(experiment, sizes, "cpu", [], full=full) for full in (False, True))
    assert len(quick[0].candidates) < len(full[0].candidates) and quick[0].candidates[0] == full[0].candidates[0]
    known = [{"operation": "grouped", "shape": quick[0].shape}]
    assert [one.known for one in run.plan(experiment, sizes, "cpu", known, full=False)] == [True, False, False]


def test_what_was_adopted_is_what_runs():
    shape = {"rows_per_expert": 320, "hidden": 256, "intermediate": 512, "quantized": True}

    def chosen():
        return matmul.choose("auto", "cpu", 1280, 8, 2, hidden=256, intermediate=512, quantized=True)

    before = chosen()
    choice.adopt("cpu", {"grouped": [shape | {"backend": "loop", "tile": 64, "small_tile": 32}]})
    assert (before.tile, chosen().tile) == (128, 64)
    choice.adopt("another", {"grouped": [shape | {"backend": "loop", "tile": 64, "small_tile": 32}]})
    assert chosen() == before
    choice.adopt("GPU", {"attention": [{"length": 512, "head_dim": 128, "form": "blocks"}], "look_up": [{"form": "tree"}]})
    assert flash.why_blocks("auto", "GPU", "bfloat16", 128, 600) == flash.MEASURED
    assert flash.why_blocks("flash", "GPU", "bfloat16", 128, 600) is None and flash.why_blocks("auto", "GPU", "bfloat16", 64, 512) is None
    assert choice.look_up() == "tree"


def test_a_damaged_file_and_one_of_other_versions_are_ignored_and_said(tmp_path, monkeypatch):
    path, site = tmp_path / "choices" / "cpu.json", {"operation": "grouped", "shape": {}, "entry": {}, "winner": "x"}
    assert store.read(path, ON) == []
    store.write(path, ON, [site])
    assert store.read(path, ON) == [site]
    with pytest.raises(store.Unusable, match=r"jax 0\.10\.2 \(now 0\.12\.0\)"):
        store.read(path, ON | {"versions": {"jax": "0.12.0", "moejax": "1"}})
    with pytest.raises(store.Unusable, match="driver absent"):
        store.read(path, ON | {"driver": "580"})
    whole = path.read_text()
    for damaged in (whole[:-9], whole.replace('"x"', '"y"'), "[]", "{}", '{"sha256": 1, "schema": 1, "made_on": {}, "sites": []}'):
        path.write_text(damaged)
        with pytest.raises(store.Unusable, match="damaged"):
            store.read(path, ON)
    heard = []
    monkeypatch.setattr(use, "note", heard.append)
    assert use.known_of(path, ON) == [] and "moejax tune CONFIG` measures again" in heard[0]


def test_other_shapes_stay_in_the_file():
    one, two, new = ({"operation": "scan", "shape": {"rows": rows}, "winner": w} for rows, w in ((1, "a"), (2, "b"), (1, "c")))
    assert store.merged([one, two], [new]) == [new, two]


def site_of(tile):
    shape = {"rows_per_expert": 320, "hidden": 256, "intermediate": 512, "quantized": True}
    entry = {"backend": "loop", "tile": tile, "small_tile": 32}
    return {"operation": "grouped", "shape": shape, "entry": entry, "winner": f"loop {tile}/32"}


def test_a_run_that_goes_on_has_the_choices_that_it_began_with(tmp_path):
    made_on, folder, experiment = store.about("cpu"), tmp_path / "run", tiny()
    folder.mkdir()
    store.write(store.place("cpu"), made_on, [site_of(64)])
    use.for_run(experiment, folder, resume=False)
    assert choice.adopted("cpu")["grouped"][0]["tile"] == 64
    store.write(store.place("cpu"), made_on, [site_of(256)])
    use.for_run(experiment, folder, resume=True)
    assert choice.adopted("cpu")["grouped"][0]["tile"] == 64
    use.for_run(experiment.changed("device", tune="off"), folder, resume=False)
    assert not choice.adopted("cpu")
    (folder / store.IN_RUN).unlink()  # it began with none: it goes on with none
    use.for_run(experiment, folder, resume=True)
    assert not choice.adopted("cpu")


def test_at_first_start_a_cpu_measures_only_if_asked(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(use, "measure", lambda experiment, full: asked.append(full) or [])
    for tune in ("auto", "off", "full"):
        use.before_start(tiny(**{"device.tune": tune, "runs_dir": str(tmp_path)}))
    monkeypatch.setattr(use.compiler_options, "nvidia_asked", lambda: True)
    for tune in ("auto", "off", "full"):
        use.before_start(tiny(**{"device.tune": tune, "runs_dir": str(tmp_path)}))
    assert asked == [True, False, True]
    (tmp_path / "there").mkdir()
    use.before_start(tiny(**{"device.tune": "full", "runs_dir": str(tmp_path), "name": "there"}))
    assert len(asked) == 3  # that start is refused: nothing is measured before


def test_the_command(toy, monkeypatch, capsys):
    monkeypatch.setattr(registry, "OPERATIONS", {"toy": "toy_operation"})
    monkeypatch.setattr(registry, "_more", {"toy": [lambda *_: [registry.Candidate("faster", {}, built_by="toy_operation:faster")]]})
    monkeypatch.setenv("COLUMNS", "150")
    arguments = ["tune", str(ROOT / "configs/bench_mixtral_tiny.yaml")]
    assert cli.main([*arguments, "--plan"]) == 0
    assert "would be tried" in capsys.readouterr().out and not store.place("cpu").exists()
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "toy: faster" in out and "times as fast as portable" in out and "at most 3 minutes" in out
    assert json.loads(store.place("cpu").read_text())["sites"][0]["winner"] == "faster"
    assert cli.main(arguments) == 0 and "at most" not in capsys.readouterr().out
    assert cli.main([*arguments, "--plan"]) == 0 and "measured before" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("operation", ["grouped", "scan", "attention", "look_up"])
def test_the_candidates_of_a_cpu_are_exact(operation):
    """In this process; what no CPU runs against itself."""
    shape = {
        "grouped": {"rows_per_expert": 40, "hidden": 64, "intermediate": 96, "quantized": True, "tokens": 160, "experts": 8, "k": 2,
                    "storage": "nf4-double", "rank": 4, "trained": False, "dtype": "float32"},
        "scan": {"rows": 2, "length": 70, "channels": 32, "state": 8, "dtype": "float32"},
        "attention": {"rows": 2, "length": 140, "heads": 4, "kv_heads": 2, "head_dim": 32, "dtype": "float32"},
        "look_up": {"out": 64, "in": 128, "storage": "nf4-double", "dtype": "float32"},
    }[operation]  # fmt: skip
    portable, *others = registry.candidates(operation, "cpu", shape)
    for one in others if operation != "attention" else [portable]:
        if one.why_not is None:
            result = trial.measured(trials.request(operation, "cpu", shape, portable, one), lambda stage: None)
            assert result["status"] == "measured"


@pytest.mark.long
def test_weights_that_are_trained_are_compared_too():
    shape = {"rows_per_expert": 40, "hidden": 64, "intermediate": 96, "quantized": False, "tokens": 160, "experts": 8, "k": 2,
             "storage": "array", "rank": 0, "trained": True, "dtype": "float32"}  # fmt: skip
    portable, *others = experts.candidates("cpu", shape)
    request = trials.request("grouped", "cpu", shape, portable, others[-1])
    assert trial.measured(request, lambda stage: None)["status"] == "measured"


def test_a_model_without_a_choice_is_a_mistake(monkeypatch, capsys):
    monkeypatch.setattr(registry, "OPERATIONS", {})
    assert cli.main(["tune", str(ROOT / "configs/bench_mixtral_tiny.yaml")]) == 2
    assert "nothing to choose" in capsys.readouterr().err
