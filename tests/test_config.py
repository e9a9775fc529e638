"""The experiment's schema: what it accepts, and how it says what it does not."""

import pytest
import yaml
from support import ROOT

from moejax import config, config_file, config_model, config_training, other_tools
from moejax.errors import UserError

MINIMAL = {
    "name": "x",
    "model": {"preset": "mixtral-tiny"},
    "tokenizer": "t.json",
    "data": {"source": "d.json", "row_tokens": 512, "max_length": 512},
    "training": {"steps": 3},
}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    def load(*overrides, **sections):
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | sections))
        return config.load(path, overrides)

    return load


def _place(dotted):
    """The annotation at a dotted key of the experiment."""
    annotation = config.Experiment
    for part in dotted.split("."):
        annotation = config_file.section_class(annotation).model_fields[part].annotation
    return annotation


def test_what_other_tools_keys_mean_is_there():
    for theirs, ours in other_tools.ours_by_theirs()["keys"].items():
        key = ours.split(" (")[0]
        assert key.startswith("the option ") or _place(key) is not None, theirs
        assert theirs == theirs.lower() and theirs not in config.Experiment.model_fields, theirs
    # What is a key here, in whatever section, is not taken for another tool's.
    assert not set(other_tools.ours_by_theirs()["keys"]) & set(config_file.sections_by_key(config.Experiment))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_its_dump_gives_the_same(path, tmp_path):
    experiment = config.load(path)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(config.dump(experiment))
    assert config.load(dumped) == experiment
    assert experiment.name == path.stem
    # Every default is visible in what the run writes back.
    assert yaml.safe_load(config.dump(experiment))["training"].keys() == config.TrainingConfig.model_fields.keys()


def test_targets_of_a_family_without_presets_are_judged_by_its_files(load, monkeypatch):
    monkeypatch.setitem(config_model.FAMILIES, "mine", type("Mine", (config.Architecture,), {}))
    assert load(model={"source": "org/mine"}, adapter={"targets": ["c_attn"]}).adapter.targets == ("c_attn",)


def test_an_override_that_is_a_number_as_yaml_does_not_read_it(load):
    assert load("model.overrides={rope_theta: 1e6}").model.architecture(None).rope_theta == 1e6


def test_overrides(load):
    experiment = load("training.learning_rate=1e-4", "data.batch_rows=3", "adapter.rank=8", "adapter.targets=[w1, gate]")
    assert experiment.training.learning_rate == 1e-4
    assert experiment.data.batch_rows == 3
    assert experiment.adapter.rank == 8 and experiment.adapter.targets == ("w1", "gate")


def test_a_leading_tilde_is_the_home_folder(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    experiment = load("model.source=~/model", "data.source=~/d.json", "tokenizer=~nobody-of-that-name/t.json", "runs_dir=~/runs")
    assert (experiment.model.source, experiment.data.source) == ("/home/me/model", "/home/me/d.json")
    assert (experiment.tokenizer, experiment.runs_dir) == ("~nobody-of-that-name/t.json", "/home/me/runs")
    assert load("model.source=a/b~c").model.source == "a/b~c"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learning_rat=1"], r"unknown key training\.learning_rat: did you mean learning_rate"),
        (["trainin.steps=1"], "unknown key trainin: did you mean training"),
        (["learning_rate=1"], r"unknown key learning_rate: did you mean training\.learning_rate\?"),
        (["training.rank=1"], r"unknown key training\.rank: did you mean adapter\.rank\?"),
        (["name=a/b"], "name = 'a/b': expected letters, digits"),
        (["training.steps=many"], r"training\.steps = 'many': expected a valid integer"),
        (["training.steps=0"], r"training\.steps = 0: expected greater than or equal to 1"),
        (["training.schedule=cosin"], r"schedule = 'cosin': expected 'cosine', 'linear' or 'constant': did you mean cosine\?"),
        (["training.compute_dtype=bf16"], r"expected 'bfloat16' or 'float32': did you mean bfloat16\?"),
        (["training.param_dtype=fp32"], r"did you mean float32\?"),
        (["training.remat=off"], r"remat = False: .*: did you mean none\?"),
        (["training.optimizer=adamw_torch_fused"], r"did you mean adamw\?"),
        (["training.optimizer=paged_adamw_8bit"], r"did you mean adamw_8bit\?"),
        (["training.moments_dtype=bfloat16", "training.optimizer=adamw_8bit"], "= bfloat16 is of adamw and lion, not of adamw_8bit"),
        (["training.optimizer=adamw_8bit", "training.param_dtype=bfloat16_stochastic"], "would hold all weights and gradients in fp32"),
        (["training.moments_dtype=bfloat16", "training.param_dtype=bfloat16"], "= bfloat16 the moments are in bf16 already"),
        (["quantization.format=4bit"], r"did you mean nf4\?"),
        (["data.batching=longest"], r"did you mean pad_longest\?"),
        (["training.schedule=xyz"], r"'linear' or 'constant'$"),
        (["training=3"], "training = 3: expected a section, with its keys below it"),
        (["fsdp=full_shard"], "unknown key fsdp: expected one of name,"),  # no guess: `seed` is as near
        (["training.learning_rate=.inf"], "learning_rate = inf: expected a finite number"),
        (["seed=99999999999"], "seed = 99999999999: expected less than 4294967296"),
        (["lr=1"], r"unknown key lr: did you mean training\.learning_rate\?"),
        (["LR=1"], r"did you mean training\.learning_rate\?"),
        (["batch_size=1"], r"unknown key batch_size: did you mean data\.batch_rows\?"),
        (["training.batch-size=1"], r"unknown key training\.batch-size: did you mean data\.batch_rows\?"),
        (["data.max_seq_length=1"], r"did you mean data\.max_length\?"),
        (["training.warmup_ratio=0.1"], r"did you mean training\.warmup_steps \(a number of steps, not a share\)\?"),
        (["lora.r=8", "lora.lora_alpha=16"], r"lora\.r: did you mean adapter\.rank\?\n.*lora\.lora_alpha: did you mean adapter\.alpha\?"),
        (["lora.x=8"], r"unknown key lora: did you mean adapter\?"),
        (["adapter.r=8"], r"unknown key adapter\.r: did you mean adapter\.rank\?"),
        (["optimizer.lr=1"], r"unknown key optimizer\.lr: did you mean training\.learning_rate\?"),
        (["model.load_in_4bit=true"], r"did you mean quantization\.format\?"),
        (["output_dir=x"], r"did you mean runs_dir"),
        (["learnin_rate=1"], r"unknown key learnin_rate: did you mean training\.learning_rate\?"),
        (["sourc=x"], r"did you mean model\.source or data\.source\?"),
        (["qqq=1"], r"unknown key qqq: expected one of name, seed"),
        (["adapter={}", "training.param_dtype=bfloat16_stochastic"], "adapters are in fp32"),
        (["training.steps=null"], r"training\.epochs or training\.steps"),
        (["model.experts_per_token=9"], "experts_per_token = 9 exceeds num_experts = 8"),
        (["model.preset=mixtral-8x7c"], "preset = 'mixtral-8x7c' is unknown: did you mean mixtral-8x7b"),
        (["model.overrides={num_layer: 2}"], "did you mean num_layers"),
        (["model.overrides={num_layers: two}"], "num_layers = 'two': expected a whole number"),
        (["model.preset=olmoe-tiny", "model.overrides={norm_topk_prob: maybe}"], "norm_topk_prob = 'maybe': expected true or false"),
        (["adapter.targets=[w4]"], "'w4' matches nothing: did you mean"),
        (["adapter.targets=[]"], "match nothing"),
        (["adapter.share=[w1,w4]"], "share: 'w4' matches nothing: did you mean w3"),
        (["adapter.share=w1"], "adapter.share = 'w1': expected a list"),
        (["adapter.dropout=1.0"], "dropout = 1.0"),
        (["quantization.format=nf4"], "nothing would be trained"),
        (["quantization={format: nf4, modules: []}", "adapter={}"], r"modules = \[\]: expected some of attention, experts, router"),
        (["data.row_tokens=4096"], "rows of 4096 tokens exceed the model's max_position_embeddings = 2048"),
        (["data.max_length=600"], "max_length = 600 exceeds row_tokens = 512"),
        (["data.source=null"], "source is missing"),
        (["tokenizer=null"], "tokenizer is missing"),
        (["data.holdout=1", "data.eval_source=x.json"], "exclude each other"),
        (["name=a/b"], "name = 'a/b'"),
        (["training.steps"], "expected key.sub=value"),
        (["name.x=1"], "name is a value, not a section"),
        (["training.warmup_steps=3"], "leaves nothing of steps = 3"),
    ],
)
def test_mistakes_are_named(overrides, message, load):
    with pytest.raises(UserError, match=message):
        load(*overrides)


def test_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        config.load(tmp_path / "none.yaml")
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(UserError, match=r"mine\.yml does not exist: did you mean \S*/mine\.yaml\?"):
        config.load(tmp_path / "mine.yml")
    (tmp_path / "bad.yaml").write_text("name: x\nmodel: [\n")
    with pytest.raises(UserError, match=r"bad\.yaml, line 3: not valid YAML"):
        config.load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="expected a mapping"):
        config.load(tmp_path / "list.yaml")


def test_the_study(load):
    """The study's Mixtral experiments: rank 16 on experts and router, NF4, 10 epochs at 5e-5, cosine; k = 2 and 8."""
    for path in (ROOT / "configs").glob("mixtral_8x7b_*_*.yaml"):
        e = config.load(path)
        assert e.adapter.rank == 16 and e.adapter.alpha == 32 and set(e.adapter.targets) == {"w1", "w2", "w3", "gate"}
        assert e.quantization.format == "nf4" and e.quantization.double
        assert (e.training.epochs, e.training.learning_rate, e.training.schedule) == (10, 5e-5, "cosine")
        assert e.model.experts_per_token == (2 if "sparse" in path.stem else 8)
        assert e.data.records == (15119 if "_cs_" in path.stem else 13921) and e.data.sha256


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rank=0", "adapter.rank = 0: expected greater than or equal to 1"),
        ("adapter.rank={experts: 0}", "adapter.rank.experts = 0: expected greater than or equal to 1"),
        ("adapter.alpha=x", "adapter.alpha = 'x': expected a valid number"),
        ("adapter.alpha={experts: x}", "adapter.alpha.experts = 'x': expected a valid number"),
    ],
)
def test_a_value_of_two_forms_is_judged_by_the_form_it_has(override, said):
    with pytest.raises(UserError) as caught:
        config.load(ROOT / "configs/demo.yaml", [override])
    assert str(caught.value).endswith(f"demo.yaml: {said}")


@pytest.mark.parametrize(
    ("vocabulary", "tokens"), [(256, 1024), (32_000, 1024), (65_536, 1024), (65_537, 512), (151_936, 256), (1 << 30, 1)]
)
def test_a_large_vocabulary_has_small_chunks_of_logits(vocabulary, tokens):
    training = config.TrainingConfig(steps=1)
    assert training.loss_chunk(vocabulary) == tokens and tokens * vocabulary <= max(config_training.LOGITS, vocabulary)
    assert config.TrainingConfig(steps=1, loss_chunk_tokens=77).loss_chunk(vocabulary) == 77


MESH = {
    "mesh.devices=3 data.batch_rows=4": r"data.batch_rows = 4 .* 3 devices .* expected 3 or 6",
    "mesh.devices=8 data.batch_rows=4": r"expected 8",
    "mesh.devices=3 data.batch_rows=3 mesh.weights=experts model.source=null model.preset=mixtral-tiny tokenizer=x": (
        r"8 experts over 3 devices do not divide: expected mesh.devices=2 or 4"
    ),
    "mesh.weights=spread placement.experts=host": r"placement.experts = host with mesh.weights = spread",
    "mesh.weights=spread adapter=null quantization.format=none": r"mesh.weights = spread is of frozen weights",
    "mesh.coordinator=a:1 mesh.processes=2": r"process_id: not set",
    "mesh.coordinator=a:1 mesh.processes=2 mesh.process_id=2": r"process_id = 2: expected 0 to 1",
    "mesh.coordinator=nowhere": "coordinator",
}


@pytest.mark.parametrize("changes", MESH)
def test_a_mesh_that_does_not_go_with_the_rest(changes):
    with pytest.raises(UserError, match=MESH[changes]):
        config.load(ROOT / "configs/demo.yaml", changes.split())
