# ruff: noqa: E402 (benchmarks/ has to be on the path first)
"""What is handed over to PyTorch's side, what it cannot express, and how the learning curves are compared. No torch here."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import ROOT

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "pytorch")]

import contract
import curves
import handover
import side_by_side
import torch_run

from moejax import config as configuration
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.hub import names, peft, weights
from moejax.hub.model import architecture, create_model
from moejax.models.config import PRESETS
from moejax.training.optimizer import make_schedule

TINY = {
    "name": "tiny",
    "model": {"preset": "mixtral-tiny", "overrides": {"num_layers": 2, "hidden_size": 64, "intermediate_size": 64}},
    "quantization": {"format": "nf4"},
    "adapter": {"rank": 4},
    "data": {"batching": "fixed", "row_tokens": 16, "max_length": 16, "batch_rows": 2},
    "training": {"steps": 3, "gradient_accumulation": 2, "compute_dtype": "float32"},
}


def test_handover_is_what_train_would_train(tmp_path):
    experiment = Experiment.model_validate(TINY)
    content = handover.write(experiment, tmp_path, stack_name="study")
    assert content == json.loads((tmp_path / "experiment.json").read_text()) == contract.read(tmp_path)
    schedule = make_schedule(experiment.training, 3)
    assert content["steps"] == 3 and content["learning_rates"] == [float(schedule(done)) for done in range(3)]
    assert contract.architecture(content) == architecture(experiment, None)
    with np.load(tmp_path / "batches.npz") as file:
        batches = dict(file)
    assert {name.partition("/")[2] for name in batches} == {"tokens", "targets", "loss_mask", "segment_ids", "positions"}
    assert [batches[f"{step}/tokens"].shape for step in range(3)] == [(2, 2, 16)] * 3
    model = create_model(experiment, architecture(experiment, None), None)
    weights_ = handover._unquantized(experiment, model.config)
    # The folder's weights, quantized again, are the codes of the run; the adapter is the run's first.
    loaded = experiment.model_copy(
        update={"model": experiment.model.model_copy(update={"source": content["base"], "preset": None})}
    )
    again = create_model(loaded, architecture(loaded, tmp_path / "base"), tmp_path / "base")
    assert handover.digests(again) == content["digests"]
    assert handover.digests(weights_) != content["digests"]
    before = {name: np.asarray(lora.a.get_value()) for name, (_, lora) in peft.adapted(model).items()}
    peft.load_adapter(model, tmp_path / "adapter")
    for name, (_, lora) in peft.adapted(model).items():
        assert np.array_equal(before[name], lora.a.get_value())


@pytest.mark.parametrize(("preset", "stack"), [pytest.param("qwen3-moe-tiny", "study", marks=pytest.mark.long), ("olmoe-tiny", "today")])
def test_a_family_s_weights_and_adapter_are_handed_over_under_its_own_names(preset, stack, tmp_path):
    """Those that transformers has by them: PEFT's settings, and the digests, are what the other side looks up."""
    share = ["w1", "w3"] if stack == "today" else None
    content = TINY | {
        "model": {"preset": preset, "overrides": {"num_layers": 1, "num_experts": 4, "experts_per_token": 2}},
        "quantization": {"format": "nf4" if stack == "study" else "none"},
        "adapter": {"rank": {"experts": 2, "attention": 4}, "share": share},
    }
    found = handover.write(Experiment.model_validate(content), tmp_path, stack_name=stack)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["r"] == 2 and set(settings["rank_pattern"].values()) == {4}
    of_experts = {f"model.layers.0.mlp.experts.3.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert of_experts | {"model.layers.0.mlp.gate.weight"} <= found["digests"].keys()
    if stack == "study":
        assert {"gate_proj", "up_proj", "down_proj"} <= set(settings["target_modules"]) and "gate" not in settings["target_modules"]
        assert found["experiment"]["quantization"]["modules"] == ["attention", "experts"]
    else:
        assert set(settings["target_parameters"]) == {"mlp.experts.down_proj", "mlp.experts.gate_up_proj"}
        parts = names.stacked(contract.architecture(found))["model.layers.0.mlp.experts.gate_up_proj"]
        assert len(parts) == 8 and {part.name for part in parts} <= found["digests"].keys()
    lora = sum(array.size for array in load_file(tmp_path / "adapter/adapter_model.safetensors").values())
    assert lora == found["model"]["params_trainable"]


def test_handover_takes_batches_in_training_order(tmp_path):
    overrides = [
        "training.epochs=null",
        "training.steps=50",
        "training.warmup_steps=0",
        "data.batch_rows=64",
        "training.eval_every=null",
    ]
    experiment = configuration.load(ROOT / "configs" / "demo.yaml", overrides)
    handover._write_batches(
        experiment, weights.resolve(str(ROOT / "assets" / "tiny-mixtral"), None), 512, tmp_path / "batches.npz"
    )
    from moejax.data.pipeline import load
    from moejax.data.tokenizer import load_tokenizer

    dataset = load(experiment.data, load_tokenizer(str(ROOT / "assets" / "tiny-mixtral")), 0, 512)
    per_epoch = dataset.train.batches_per_epoch(0)
    assert per_epoch < 50
    with np.load(tmp_path / "batches.npz") as file:
        assert np.array_equal(file["0/tokens"][0], next(dataset.train.iterate(0)).tokens)
        assert np.array_equal(file[f"{per_epoch}/segment_ids"][0], next(dataset.train.iterate(1)).segment_ids)


@pytest.mark.parametrize(
    ("changes", "stack", "words"),
    [
        ({}, "plain", "model is a Mixtral"),
        ({"training": {"optimizer": "adafactor"}}, "study", "training.optimizer = adafactor"),
        ({"model": {"aux_loss_coef": 0.01}}, "study", "model.aux_loss_coef = 0.01"),
        ({"adapter": {"dropout": 0.1}}, "study", "adapter.dropout = 0.1"),
        ({}, "today", "quantization.format = nf4"),
        ({"quantization": {"format": "none"}, "adapter": {"targets": ["w1", "w2"]}}, "today", "adapter.targets"),
        ({"quantization": {"format": "none"}}, "today", r"adapter\.share = null.*set adapter\.share=\[w1,w3\]"),
        ({"adapter": {"share": ["w1", "w3"]}}, "study", r"adapter\.share = \['w1', 'w3'\]"),
    ],
)
def test_what_pytorch_cannot_express(changes, stack, words, tmp_path):
    content = {name: TINY[name] | changes.get(name, {}) if name != "name" else "tiny" for name in TINY}
    with pytest.raises(UserError, match=words) as error:
        handover.write(Experiment.model_validate(content), tmp_path, stack_name=stack)
    assert not list(tmp_path.iterdir()) and "\n" not in str(error.value) and "cannot express it: " in str(error.value)


def handed_over(experiment):
    return {"experiment": experiment.model_dump(mode="json"), "hub_config": PRESETS["blackmamba-tiny"].to_hub_config()}


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"param_dtype": "bfloat16_stochastic"}, r"training\.param_dtype = bfloat16_stochastic: .*rounds to the nearest"),
        ({"weight_decay": 0.1}, r"training\.weight_decay_on = matrices: .*set training\.weight_decay_on=all"),
    ],
)
def test_what_pytorch_cannot_express_of_a_model_trained_whole(training, words):
    experiment = configuration.load(ROOT / "configs/demo_blackmamba.yaml", [f"training.{k}={v}" for k, v in training.items()])
    with pytest.raises(contract.CannotRun, match=words):
        contract.check(handed_over(experiment), "plain")
    all_of_it = configuration.load(ROOT / "configs/demo_blackmamba.yaml", ["training.weight_decay=0.1", "training.weight_decay_on=all"])
    contract.check(handed_over(all_of_it), "plain")


def test_a_missing_environment_names_the_make_target(tmp_path):
    for stack, target in (("study", "reference4"), ("today", "reference5"), ("plain", "reference4")):
        with pytest.raises(UserError, match=f"`make {target}` builds the PyTorch environment"):
            torch_run.reference_python(stack, tmp_path / "python")


def test_a_folder_that_is_no_handover(tmp_path):
    with pytest.raises(contract.CannotRun, match=r"experiment\.json does not exist"):
        contract.read(tmp_path)
    (tmp_path / "experiment.json").write_text('{"format": 99}')
    with pytest.raises(contract.CannotRun, match="format = 99, expected 3"):
        contract.read(tmp_path)


def test_the_first_tensor_that_differs_is_named():
    expected = {"a.weight": "1", "b.weight": "2", "c.weight": "3"}
    content = {"digests": expected, "model": {"params_trainable": 6}}
    contract.compare(expected, 6, content)
    contract.compare({}, 6, content | {"digests": None})
    with pytest.raises(contract.CannotRun, match=r"load the checkpoint differently: tensor 'b\.weight' differs"):
        contract.compare(expected | {"b.weight": "x", "c.weight": "y"}, 6, content)
    with pytest.raises(contract.CannotRun, match=r"tensor 'a\.weight' is missing in PyTorch"):
        contract.compare({"b.weight": "2"}, 6, content)
    with pytest.raises(contract.CannotRun, match=r"trains 1,234 parameters, moejax 6: not the same adapter"):
        contract.compare(expected, 1234, content)


def test_random_weights_are_handed_over_as_sizes_alone(tmp_path):
    experiment = Experiment.model_validate(TINY)
    content = handover.write_random(experiment, tmp_path, stack_name="study")
    assert content["base"] is None and content["digests"] is None
    whole = handover.write(experiment, tmp_path / "whole", stack_name="study")
    settings, of_whole = (json.loads((f / "adapter/adapter_config.json").read_text()) for f in (tmp_path, tmp_path / "whole"))
    assert settings | {"base_model_name_or_path": None} == of_whole | {"base_model_name_or_path": None}
    assert content["model"] == whole["model"] and content["hub_config"] == whole["hub_config"]
    with np.load(tmp_path / "batches.npz") as file, np.load(tmp_path / "whole" / "batches.npz") as other:
        assert len(file.files) == 5 and np.array_equal(file["0/tokens"], other["0/tokens"])


def record(step, loss, counts=((4, 4, 0),), ties=((0.1, (0, 0, 0), (1, 2)),)):
    same = {"queries": 2, "real_tokens": 4, "supervised_tokens": 3}
    return {"step": step, "loss": loss, "expert_counts": [list(c) for c in counts], "nearest_ties": list(ties)} | same


def test_curves_name_the_token_that_ties():
    ours = [record(1, 2.0), record(2, 1.0), record(3, 0.9)]
    theirs = [record(1, 2.00002), record(2, 1.001, ((4, 3, 1),), ((3e-7, (0, 1, 5), (1, 2)),)), record(3, 0.8)]
    result = curves.compare(ours, theirs, claimed=True)
    assert result["agrees"] and result["first_step_outside"] == 2
    assert result["largest_before_routing_differs"] == pytest.approx(1e-5, rel=1e-3)
    tie = result["routing_differs"]
    assert (tie["step"], tie["layer"], tie["row"], tie["position"], tie["gap"]) == (2, 0, 1, 5, 3e-7)
    assert "row 1, position 5 otherwise: its experts 1 and 2 are 3.0e-07 apart" in curves.say("case", result)


def test_curves_that_part_without_a_tie_do_not_agree():
    result = curves.compare([record(1, 2.0)], [record(1, 2.1)], claimed=True)
    assert result["agrees"] is False and result["routing_differs"] is None
    assert curves.compare([record(1, 2.0)], [record(1, 2.1)], claimed=False)["agrees"] is None


def test_curves_of_other_batches_are_refused():
    with pytest.raises(UserError, match="step 1: queries = 3 here, 2 in PyTorch"):
        curves.compare([record(1, 2.0) | {"queries": 3}], [record(1, 2.0)], claimed=True)


def test_the_curves_table_says_where_a_run_leaves_the_tolerance():
    apart = curves.compare([record(1, 2.0), record(2, 1.1)], [record(1, 2.0), record(2, 1.0)], claimed=True)
    control = {"largest_relative_difference": 0.02, "first_step_outside": 81, "routing_differs_at": None}
    bf16 = curves.compare([record(1, 2.0)], [record(1, 2.1)], claimed=False)
    lines = curves.table({"bf16": bf16, "dense": apart | {"control": control}}).splitlines()
    assert lines[2].startswith("| dense | 1.0e-01 **(outside from step 2)** | never | 2.0e-02, 81, never |")
    assert len(lines) == 3  # of bf16 nothing is claimed
    assert {line.count("|") for line in lines} == {6}


def test_a_table_is_put_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    curves.between(page, "x", "new\n")
    assert page.read_text() == "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb\n"
    with pytest.raises(UserError, match="has no marks <!-- y: begin -->"):
        curves.between(page, "y", "new\n")


def test_shares_stand_beside_the_paper_s():
    side = {
        "step_seconds": {"median": 0.5},
        "attributed": 0.987,
        "takeaways": side_by_side.takeaways(side_by_side.beside("mixtral-sparse")[0]),
    }
    dense = side | {"step_seconds": {"median": 1.5}}
    results = {name: {"moejax": s, "pytorch": s} for name, s in (("mixtral-sparse", side), ("mixtral-dense", dense))}
    lines = side_by_side.table(results).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and lines[0].endswith(f"| {side_by_side.RATIO} |")
    assert lines[2].startswith("| mixtral-sparse | 91/91/91 % |") and lines[2].endswith("| – |")
    assert lines[3].endswith("/3.00/3.00 |")
    lines = side_by_side.table({"olmoe-sparse": {"moejax": side, "pytorch": side}}).splitlines()
    assert lines[2].startswith("| olmoe-sparse | –/91/91 % |")  # the study has no such model
