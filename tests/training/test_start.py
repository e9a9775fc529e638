"""How a run starts: what is refused before anything expensive, and what a refused start leaves."""

import errno
import json
import shutil
import types
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file
from support import ROOT, TINY, tiny_experiments
from test_loop import not_compiled

from moejax import config, device
from moejax.contents import MadeOf
from moejax.errors import UserError
from moejax.hub.peft import save_adapter
from moejax.hub.safetensors_file import write_file
from moejax.hub.save import save_weights
from moejax.models.build import build
from moejax.models.config import PRESETS, LoRAConfig
from moejax.runs import export, folders
from moejax.runs import open as opened
from moejax.runs.claim import claimed
from moejax.training import loop, run_steps, start
from moejax.training.metrics import MetricWriter
from moejax.training.program import TrainProgram


def test_a_warm_up_longer_than_the_run(make_experiment, tmp_path, monkeypatch):
    """The config cannot know it where epochs are given: the run does, before a model is made."""
    monkeypatch.setattr(start, "create_model", None)
    training = {"steps": None, "epochs": 2, "gradient_accumulation": 1, "warmup_steps": 20}
    with pytest.raises(UserError, match=r"training: warmup_steps = 20 leaves nothing of steps = 14 \(2 epochs of 7 steps\): lower"):
        loop.run(make_experiment(data={"batch_rows": 8}, training=training), resume=False)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(Exception, match="warmup_steps = 20 leaves nothing of steps = 14"):  # the same words
        make_experiment(training={"steps": 14, "warmup_steps": 20})


def test_what_comes_never_is_told(make_experiment, tmp_path, capsys):
    (tmp_path / "three.json").write_text(json.dumps(json.loads((tmp_path / "train.json").read_text())[:3]))
    data = {"source": str(tmp_path / "three.json"), "batch_rows": 4, "holdout": 0}
    training = {"steps": 1, "gradient_accumulation": 2, "eval_every": 5}
    experiment = make_experiment(training=training, checkpoint={"every": 7}, data=data)
    assert loop.run(experiment, resume=False) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [line.split(":")[1].strip().split(" =")[0] for line in told] == [
        "training.eval_every", "training.eval_every", "checkpoint.every", "training.gradient_accumulation", "data.batch_rows"
    ]  # fmt: skip


def test_few_steps_are_said_with_what_to_change(make_experiment, monkeypatch):
    """Of epochs alone: a number of steps is what was asked."""
    data = types.SimpleNamespace(evaluation=None, train=types.SimpleNamespace(batches_per_epoch=lambda epoch: 3, rows=lambda: 24))
    training = {"steps": None, "epochs": 2, "gradient_accumulation": 1, "warmup_steps": 0}
    (told,) = run_steps.check_steps(make_experiment(training=training), data)
    assert told.startswith("note: 6 steps in all (2 epochs of 3 steps) are few to learn from: raise training.epochs")
    assert not run_steps.check_steps(make_experiment(training=training | {"epochs": 7}), data)
    assert not run_steps.check_steps(make_experiment(training=training | {"epochs": None, "steps": 6}), data)


def test_two_runs_of_one_name(make_experiment, tmp_path, monkeypatch):
    """The second is refused before it reads data, and whether it resumes or not; nothing of the first is touched."""
    monkeypatch.setattr(start, "read_data", None)
    experiment = make_experiment()
    with claimed(tmp_path / "runs/run"):
        for resume in (False, True):
            with pytest.raises(UserError, match=r"runs/run is in use: process \d+"):
                loop.run(experiment, resume=resume)
        assert len(list((tmp_path / "runs/run").iterdir())) == 1


@pytest.mark.parametrize("what", ["config.yaml", "metrics.jsonl", "prediction.json"])
def test_a_start_that_cannot_write_is_one_message_and_leaves_nothing(what, make_experiment, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "runs/run" / what))

    place = {"config.yaml": (folders, "replace_text"), "metrics.jsonl": (MetricWriter, "__init__")}
    with monkeypatch.context() as patch, pytest.raises(UserError, match=rf"{what} cannot be written \(No space .*\): make room"):
        patch.setattr(TrainProgram, "compile_within", not_compiled)
        patch.setattr(*place.get(what, (loop.prediction, "announce")), full)
        loop.run(make_experiment(), resume=False)
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_while_it_trains_is_one_message_and_it_resumes(make_experiment, tmp_path, monkeypatch, capsys):
    one = {"gradient_accumulation": 1, "eval_every": None}
    experiment, write = make_experiment(training={"steps": 4} | one, checkpoint={"every": 2}, data={"holdout": 0}), MetricWriter.write

    def full(self, step, record):
        if step == 4:
            self._lines.write('{"step": 4, "epo')
            self._lines.flush()
            with self._writing():
                raise OSError(errno.ENOSPC, "No space left on device")
        write(self, step, record)

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"measured cannot be written \(No space .*--resume"):
        patch.setattr(MetricWriter, "write", full)
        loop.run(experiment, resume=False)
    capsys.readouterr()
    assert loop.run(experiment, resume=True) == 0
    assert "metrics.jsonl: line 4 is not whole" in capsys.readouterr().out
    assert config.load(tmp_path / "runs/run/config.yaml").name == "run"


def test_an_event_file_on_a_full_disk(make_experiment, tmp_path):
    """The real thing, where the kernel has it: /dev/full takes nothing."""
    writer = MetricWriter(tmp_path, make_experiment())
    writer._events._file.raw.close()
    writer._events._file = open("/dev/full", "wb")  # noqa: SIM115, PTH123
    writer._events._writer._writer = writer._events._file
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): make room there"):
        writer.write(1, {"loss": 1.0})


def changed(experiment, section, **values):
    return experiment.model_copy(update={section: getattr(experiment, section).model_copy(update=values)})


def place_of(experiment):
    return Path(experiment.runs_dir) / experiment.name


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A finished run of which everything lies in files: (its folder's parent, its config as a dict)."""
    folder = tmp_path_factory.mktemp("begun")
    make = tiny_experiments(folder)
    problems = json.loads((ROOT / "assets/problems/train.json").read_text())
    (folder / "eval.json").write_text(json.dumps(problems[60:65]))
    sizes = PRESETS["mixtral-tiny"].replace(**TINY)
    base = build(sizes, adapter=LoRAConfig(2, 4.0, 0.0, ("gate",)), key=jax.random.key(1))
    save_weights(base, folder / "base")
    save_adapter(base, folder / "earlier/adapter", "base")
    shutil.copy(ROOT / "assets/tiny-mixtral/tokenizer.json", folder / "tokenizer.json")
    made = make(
        model={"source": str(folder / "base"), "preset": None, "overrides": {}},
        adapter={"rank": 2, "alpha": 4.0, "targets": ["gate"], "init_from": str(folder / "earlier/adapter")},
        data={"holdout": 0, "eval_source": str(folder / "eval.json")},
        training={"steps": None, "epochs": 1, "gradient_accumulation": 1},
    ).model_copy(update={"tokenizer": str(folder / "tokenizer.json")})
    assert loop.run(made, resume=False) == 0
    return folder, made


@pytest.fixture
def copied(begun, tmp_path):
    """The same in a place of its own, whose files may be changed."""
    folder, made = begun
    shutil.copytree(folder, tmp_path / "copy")
    written = tmp_path / "copy/runs/run/config.yaml"
    written.write_text(written.read_text().replace(str(folder), str(tmp_path / "copy")))
    text = config.dump(made).replace(str(folder), str(tmp_path / "copy"))
    return tmp_path / "copy", config.Experiment.model_validate(yaml.safe_load(text))


def edited(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def flip_a_bit(path):
    """Of the numbers, the lowest bit of one; its checksum too, as by who trained it on."""
    tensors = load_file(path)
    last = tensors[max(tensors)]
    last.reshape(-1).view(np.uint8)[-4] ^= 1
    write_file(path, tensors)


def longer(path):
    path.write_bytes(path.read_bytes() + b" ")


def rewritten(path):
    """The same tensors in a file of another size."""
    save_file(load_file(path), path, metadata={"format": "pt", "note": "rewritten"})


CHANGES = {
    "longer data": (lambda f: edited(f / "train.json", lambda r: r + r), r"data: sha256 \w{16}… when the run began, \w{16}… now; steps"),
    "truncated data": (lambda f: edited(f / "train.json", lambda r: r[:5]), r"data: .*; steps: \d+ in the whole run when it began, 2 now"),
    "one word of the data": (lambda f: edited(f / "train.json", lambda r: [r[0] | {"output": "No."}, *r[1:]]), "Changed: data: sha256"),
    "evaluation": (lambda f: edited(f / "eval.json", lambda r: r[1:]), "Changed: evaluation: sha256"),
    "tokenizer": (lambda f: longer(f / "tokenizer.json"), "Changed: tokenizer: sha256"),
    "adapter": (lambda f: flip_a_bit(f / "earlier/adapter/adapter_model.safetensors"), "Changed: adapter: sha256"),
    "a setting of the base": (
        lambda f: edited(f / "base/config.json", lambda c: c | {"rms_norm_eps": 1e-3}), "Changed: base: config.json and generation_config"
    ),
    "another base": (lambda f: rewritten(f / "base/model.safetensors"), "Changed: base: names, sizes and index of its files"),
    "a base of the same sizes": (lambda f: flip_a_bit(f / "base/model.safetensors"), "Changed: base: sha256"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_resumed_with_its_own_contents_alone(what, copied, monkeypatch):
    folder, experiment = copied
    change, message = CHANGES[what]
    change(folder)
    # Reported before anything is compiled or loaded.
    monkeypatch.setattr(TrainProgram, "compile_within", not_compiled if "same sizes" in what else None)
    monkeypatch.setattr(loop, "Trainer", None)
    before = {p: p.read_bytes() for p in place_of(experiment).rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=f"cannot resume .*{message}.*checkpoint.resume_with_changed="):
        loop.run(experiment, resume=True)
    assert {p: p.read_bytes() for p in place_of(experiment).rglob("*") if p.is_file()} == before


def test_every_part_is_compared_and_named():
    """Also the problems of an eval: section; weights that another device rounded are left to their files."""
    parts = ("data", "evaluation", "questions", "tokenizer", "adapter", "base_config", "base_files", "base")
    then, now = (MadeOf(**dict.fromkeys(parts, letter * 64), platform="cpu", steps=number) for letter, number in (("a", 1), ("b", 2)))
    assert set(then.differences(now)) == {*parts, "steps"} - {"base_config", "base_files"}
    assert then.differences(then) == MadeOf().differences(now) == {}
    elsewhere = then.model_copy(update={"base": "b" * 64, "platform": "gpu"})
    assert then.differences(elsewhere) == {}
    with pytest.raises(UserError, match=r"runs/x with another content\. Changed: questions: .*resume_with_changed=\[questions,tokenizer"):
        then.check(now, ("data", "evaluation"), Path("runs/x"))


def test_other_data_where_they_are_asked_for(copied, capsys):
    """Longer data train on, by a schedule of their length; what was changed stays written. The next resume takes the new ones as given."""
    folder, experiment = copied
    edited(folder / "train.json", lambda records: records + records)
    experiment = changed(experiment, "checkpoint", resume_with_changed=("data",))
    assert loop.run(experiment, resume=True) == 0
    assert "data: sha256" in capsys.readouterr().out
    made_of = config.load(place_of(experiment) / "config.yaml").made_of
    assert [line.split(":")[0] for line in made_of.changed] == ["data", "steps"] and made_of.steps > 4
    edited(folder / "train.json", lambda records: records[:5])
    with pytest.raises(UserError, match=r"has done \d+ steps, and .* the whole run has 2: nothing is left to train"):
        loop.run(experiment, resume=True)


def test_what_was_learned_is_not_put_on_another_base(copied):
    """Asking a run's model what it answers: its adapter belongs to the base and the tokenizer that it was trained with."""
    folder, experiment = copied
    run = place_of(experiment)
    edited(folder / "base/config.json", lambda c: c)  # written otherwise, the same values
    loaded = opened.load(run)
    flip_a_bit(folder / "base/model.safetensors")
    with pytest.raises(UserError, match=r"runs/run was made of another content\. Changed: base: sha256"):
        loaded.make()
    edited(folder / "base/config.json", lambda c: c | {"rope_theta": 1.0})
    for refused in (lambda: opened.load(run), lambda: export.export(run, folder / "out", None, True, None)):
        with pytest.raises(UserError, match="Changed: base: config"):
            refused()
    longer(folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"Changed: tokenizer: sha256 .*; base: config"):
        opened.load(run)


def test_another_place_with_the_same_content(copied, capsys, monkeypatch):
    """It is reported, and written: what comes later finds the run's parts where they are now."""
    monkeypatch.setattr(TrainProgram, "compile_within", not_compiled)
    folder, experiment = copied
    (folder / "moved").mkdir()
    (folder / "base").rename(folder / "moved/base")
    edited(folder / "train.json", lambda records: records)  # other bytes, the same records
    (folder / "train.json").rename(folder / "elsewhere.json")
    moved = changed(changed(experiment, "data", source=str(folder / "elsewhere.json")), "model", source=str(folder / "moved/base"))
    assert loop.run(moved, resume=True) == 0
    out = capsys.readouterr().out
    assert "moved/base: another place; the contents decide" in out and "nothing was left to train" in out
    assert config.load(place_of(moved) / "config.yaml").data.source == moved.data.source


def test_a_run_of_a_version_that_kept_no_hashes(copied, capsys, monkeypatch):
    monkeypatch.setattr(TrainProgram, "compile_within", not_compiled)
    _, experiment = copied
    path = place_of(experiment) / "config.yaml"
    path.write_text(config.dump(config.load(path).model_copy(update={"made_of": None})))
    assert loop.run(experiment, resume=True) == 0
    assert "kept no hashes: its contents cannot be compared" in capsys.readouterr().out
    assert config.load(path).made_of.base is not None


def test_weights_come_last(make_experiment, tmp_path, monkeypatch):
    """Of a Hub id of which only the small files are here: data that are wrong and a step that does not fit are reported first."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub/models--org--name/snapshots" / ("a" * 40)
    shutil.copytree(ROOT / "assets/tiny-mixtral", snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "hub/models--org--name/refs").mkdir()
    (tmp_path / "hub/models--org--name/refs/main").write_text("a" * 40)
    model = {"source": "org/name", "preset": None, "overrides": {}}
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        loop.run(make_experiment(model=model, data={"source": "nowhere.json"}), resume=False)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="out of memory: the step asks for"):
        patch.setattr(device, "usable_bytes", lambda: 1_000_000)
        loop.run(make_experiment(model=model, data={"batch_rows": 1}), resume=False)
    monkeypatch.setattr(TrainProgram, "compile_within", not_compiled)
    with pytest.raises(UserError, match=r"a{40} has none of model\.safetensors"):
        loop.run(make_experiment(model=model), resume=False)
    assert not (tmp_path / "runs").exists()


def gpu(capability, platform="gpu"):
    return SimpleNamespace(platform=platform, device_kind="Tesla V100-SXM2-16GB", compute_capability=capability)


def test_a_gpu_without_bf16_is_refused_and_what_works_is_named(make_experiment):
    full = {"adapter": None, "quantization": {"format": "none"}}
    bf16 = make_experiment(training={"compute_dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"V100.* 7\.0, and training\.compute_dtype = bfloat16 needs 8\.0.*compute_dtype=float32"):
        start.check_device(bf16, gpu("7.0"))
    with pytest.raises(UserError, match=r"7\.5, and training\.param_dtype = bfloat16 needs"):
        start.check_device(make_experiment(training={"param_dtype": "bfloat16"}, **full), gpu("7.5"))
    for there in (gpu("8.0"), gpu("8.6"), gpu("9.0"), gpu("10.0"), gpu("12.0"), gpu("gfx942"), gpu("", "cpu")):
        start.check_device(bf16, there)
    start.check_device(make_experiment(), gpu("7.0"))  # fp32 runs there


def test_a_run_asks_first(make_experiment, monkeypatch, tmp_path):
    monkeypatch.setattr(loop.jax, "local_devices", lambda: [gpu("7.0")])
    with pytest.raises(UserError, match="compute capability"):
        loop.run(make_experiment(training={"compute_dtype": "bfloat16"}), resume=False)
    assert not (tmp_path / "runs").exists()
