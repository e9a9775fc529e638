"""A run's folder: which configs may continue it."""

import pytest
import yaml

from moejax.config import DeviceConfig, dump
from moejax.contents import MadeOf
from moejax.errors import UserError
from moejax.runs import folders


def changed(experiment, section, **values):
    return experiment.model_copy(update={section: getattr(experiment, section).model_copy(update=values)})


def test_what_may_differ_when_a_run_is_continued(make_experiment):
    experiment = make_experiment("older")
    assert folders.prepare(experiment, resume=False) is None
    folders.write_config(experiment)
    config = folders.folder_of(experiment) / "config.yaml"
    older = yaml.safe_load(config.read_text())
    # A run of a version that did not know these keys.
    del older["device"]["compilation_cache"], older["profile"], older["made_of"], older["adapter"]["share"]
    config.write_text(yaml.safe_dump(older))
    assert folders.prepare(experiment, resume=True) is None
    folders.prepare(experiment.model_copy(update={"device": DeviceConfig(memory_fraction=0.5)}), resume=True)
    folders.prepare(changed(experiment, "data", streaming=True), resume=True)
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        folders.prepare(experiment.model_copy(update={"seed": 1}), resume=True)
    with pytest.raises(UserError, match=r"adapter\.share: None -> \['w1', 'w3'\]"):
        folders.prepare(changed(experiment, "adapter", share=("w1", "w3")), resume=True)
    with pytest.raises(UserError, match=r"data\.source: .*train\.json' -> 'elsewhere\.json'"):  # what was in it is not known
        folders.prepare(changed(experiment, "data", source="elsewhere.json"), resume=True)
    older["sedd"] = 1
    config.write_text(yaml.safe_dump(older))
    with pytest.raises(UserError, match="sedd"):
        folders.prepare(experiment, resume=True)
    assert "sedd" not in dump(experiment)


def test_targets_by_other_names_are_the_same(make_experiment):
    """As the checkpoints of other families call them; another target is another run."""
    experiment = changed(make_experiment("named"), "adapter", targets=("w1", "w3"), share=("w1", "w3"), rank={"w1": 2, "w3": 2})
    folders.write_config(experiment)
    theirs = {"targets": ("up_proj", "gate_proj"), "share": ("gate_proj", "up_proj"), "rank": {"gate_proj": 2, "w3": 2}}
    folders.prepare(changed(experiment, "adapter", **theirs), resume=True)
    with pytest.raises(UserError, match=r"adapter\.targets: \['w1', 'w3'\] -> \['w1', 'w2'\]"):
        folders.prepare(changed(experiment, "adapter", targets=("gate_proj", "down_proj")), resume=True)


def test_a_run_that_decayed_all_goes_on_so(make_experiment):
    """Before there was `weight_decay_on`, norms and biases were decayed too."""
    whole = make_experiment("decayed", training={"weight_decay": 0.1}, adapter=None, quantization={"format": "none"})
    folders.write_config(whole)
    config = folders.folder_of(whole) / "config.yaml"
    older = yaml.safe_load(config.read_text())
    del older["training"]["weight_decay_on"]
    config.write_text(yaml.safe_dump(older))
    with pytest.raises(UserError, match=r"training\.weight_decay_on: 'all' -> 'matrices'"):
        folders.prepare(whole, resume=True)
    folders.prepare(changed(whole, "training", weight_decay_on="all"), resume=True)


def test_a_place_may_differ_where_its_content_is_known(make_experiment):
    """Then the content decides, which is read later."""
    experiment = make_experiment().model_copy(update={"made_of": MadeOf(data="0", tokenizer="1")})
    folders.write_config(experiment)
    elsewhere = changed(experiment, "data", source="elsewhere.json").model_copy(update={"tokenizer": "other", "made_of": None})
    assert folders.prepare(elsewhere, resume=True) == experiment.made_of
    assert list(folders.moved(experiment, elsewhere)) == ["tokenizer", "data.source"]
    declared = changed(elsewhere, "data", records=5, sha256="0")
    with pytest.raises(UserError, match=r"data\.records: None -> 5; data\.sha256"):
        folders.prepare(declared, resume=True)
    folders.prepare(changed(declared, "checkpoint", resume_with_changed=("data",)), resume=True)
    with pytest.raises(UserError, match=r"eval: None ->|model\.source: None -> 'x'"):  # a run without a source has random weights
        folders.prepare(changed(experiment, "model", source="x"), resume=True)
