"""Whole runs: metrics, resuming, stopping, and what a run leaves behind."""

import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from support import TINY, tiny_experiments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moejax import config, device
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.hub.peft import load_adapter
from moejax.runs import open as runs
from moejax.training import dry_run, loop
from moejax.training.loop import Trainer
from moejax.training.program import Compiled, TrainProgram


def not_compiled(self, rows, row_tokens, limit):
    """In the place of `TrainProgram.compile_within` where no step is done."""
    return Compiled(None, 0, 0, 0, 0.0)


def folder_of(experiment):
    return Path(experiment.runs_dir) / experiment.name


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def stop_at(monkeypatch, step):
    """As if SIGTERM had come during that step."""
    finish = Trainer._finish

    def and_stop(self, pending):
        finish(self, pending)
        if pending.step == step - 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_finish", and_stop)


def test_20_steps_equal_10_and_resumed_10_to_the_bit(make_experiment, monkeypatch, capsys):
    """With dropout, accumulation, packing and NF4: the adapter's bytes and every loss."""
    settings = {"training": {"schedule": "cosine"}, "adapter": {"dropout": 0.1}}
    straight, halves = (make_experiment(name, **settings) for name in ("straight", "halves"))
    assert loop.run(straight, resume=False) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        assert loop.run(halves, resume=False) == 128 + signal.SIGTERM
    assert f"moejax train {folder_of(halves)}/config.yaml --resume" in capsys.readouterr().out
    assert max(losses(folder_of(halves))) == 10
    assert loop.run(config.load(folder_of(halves) / "config.yaml"), resume=True) == 0
    assert losses(folder_of(halves)) == losses(folder_of(straight))
    assert adapter(folder_of(halves)) == adapter(folder_of(straight))


CHATML = {"model": {"overrides": TINY | {"vocab_size": 410}}, "data": {"template": "chatml"}, "training": {"steps": 3}}
"""On a base whose embedding has one row left."""


def test_rows_of_added_tokens_are_trained_and_kept(make_experiment, capsys):
    """Two rows of both tables, counted, and in the adapter with the tokenizer."""
    experiment = make_experiment(**CHATML).model_copy(update={"added_tokens": ("auto",)})
    dry_run.report(experiment)
    line = next(line for line in capsys.readouterr().out.splitlines() if "rows of tokens: embeddings" in line)
    assert line.split("\u2502")[2].strip() == "64"  # two rows of 32
    assert loop.run(experiment, resume=False) == 0
    kept = config.load(folder_of(experiment) / "config.yaml")
    assert (kept.model.vocabulary, kept.adapter.token_rows, kept.added_tokens) == (411, (409, 410), ("<|im_start|>", "<|im_end|>"))
    loaded = runs.load(folder_of(experiment))
    assert loaded.ends.ids[0] == 410 and loaded.tokenizer.convert_tokens_to_ids("<|im_end|>") == 410
    model = loaded.make()
    for rows, table in ((model.embed_rows, model.embed.weight), (model.head_rows, model.head.weight)):
        moved = np.abs(np.asarray(rows.rows.get_value()) - np.asarray(table.get_value())[[409, 410]]).max(axis=1)
        assert (moved > 1e-3).all()
    beside = load_tokenizer(str(folder_of(experiment) / "adapter"))
    assert beside.convert_tokens_to_ids("<|im_end|>") == 410 and "im_start" in beside.chat_template


@pytest.mark.long
def test_a_streamed_run_with_added_tokens_resumes_to_the_bit(make_experiment, monkeypatch):
    """As one that reads its file whole and is not stopped."""
    straight, halves = (make_experiment(name, **CHATML).model_copy(update={"added_tokens": ("auto",)}) for name in ("straight", "halves"))
    lines = Path(straight.data.source).with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(record) + "\n" for record in json.loads(Path(straight.data.source).read_text())))
    halves = halves.changed("data", source=str(lines), streaming=True)
    assert loop.run(straight, resume=False) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert loop.run(halves, resume=False) == 128 + signal.SIGTERM
    assert loop.run(halves, resume=True) == 0
    assert losses(folder_of(halves)) == losses(folder_of(straight))
    assert adapter(folder_of(halves)) == adapter(folder_of(straight))


BLACKMAMBA = {
    "model": {
        "preset": "blackmamba-tiny",
        "overrides": {"hidden_size": 32, "intermediate_size": 24, "num_layers": 2, "num_experts": 4},
    },
    "quantization": {"format": "none"},
    "adapter": None,
    "training": {"steps": 8, "label_smoothing": 0.1},
}


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param({"optimizer": "adamw"}, marks=pytest.mark.long), {"optimizer": "adamw_8bit"},
        pytest.param({"optimizer": "adafactor"}, marks=pytest.mark.long),
        pytest.param({"optimizer": "lion", "moments_dtype": "bfloat16"}, marks=pytest.mark.long),
    ],
    ids=lambda settings: settings["optimizer"],
)  # fmt: skip
def test_a_blackmamba_trains_and_resumes_to_the_bit(optimizer, make_experiment, monkeypatch):
    """Full fine-tuning through the same loop: 8 steps equal 4 and resumed 4, in every loss and every byte of the model."""
    settings = BLACKMAMBA | {"training": BLACKMAMBA["training"] | optimizer}
    straight, halves = make_experiment("straight", **settings), make_experiment("halves", **settings)
    assert loop.run(straight, resume=False) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert loop.run(halves, resume=False) == 128 + signal.SIGTERM
    assert loop.run(halves, resume=True) == 0
    assert losses(folder_of(halves)) == losses(folder_of(straight))
    model = [(folder_of(e) / "model" / "model.safetensors").read_bytes() for e in (straight, halves)]
    assert model[0] == model[1]
    whole = {"source": str(folder_of(straight) / "model"), "preset": None, "overrides": {}}
    again = make_experiment("again", **settings | {"model": whole, "tokenizer": None})
    monkeypatch.setattr(TrainProgram, "compile_within", not_compiled)
    monkeypatch.setattr(Trainer, "train", lambda self: 0)
    assert loop.run(again, resume=False) == 0  # the folder is a whole model: with its config and its tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The experiment of a run that none of the tests changes."""
    make = tiny_experiments(tmp_path_factory.mktemp("finished"))
    experiment = make(training={"steps": 4, "eval_every": 2}, checkpoint={"every": 1, "keep": 2})
    assert loop.run(experiment, resume=False) == 0
    return experiment


def test_what_a_run_leaves_behind(finished):
    folder = folder_of(finished)
    written = config.load(folder / "config.yaml")
    filled_in = {"made_of": None, "adapter": finished.adapter, "quantization": finished.quantization, "data": finished.data}
    assert written.model_copy(update=filled_in) == finished and written.made_of.steps == 4
    assert written.data.model_dump() == finished.data.model_dump() | {"template": "mistral"}
    assert written.adapter.model_dump() == finished.adapter.model_dump() | {"targets": ("w1", "w2", "w3", "gate")}
    assert written.quantization.model_dump() == finished.quantization.model_dump() | {"modules": ("attention", "experts", "router")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    expected = {
        "loss", "learning_rate", "grad_norm", "update_norm", "param_norm", "queries_per_second", "tokens_per_second",
        "padded_tokens_per_second", "model_flop_utilization", "host_peak_bytes", "expert_counts", "expert_load_variance",
        "expert_load_variance/layer_1", "step_seconds", "epoch", "aux_loss",
    }  # fmt: skip
    assert expected <= steps[0].keys()
    assert [sum(c) for c in steps[0]["expert_counts"]] == [2 * steps[0]["real_tokens"]] * 2
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
    events = EventAccumulator(str(folder)).Reload()
    tags = {"loss/train", "training/learning_rate", "loss/evaluation", "router/expert_load_variance", "config"}
    assert tags <= set(events.Tags()["tensors"])
    kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert kept[-2:] == [3, 4] and len(kept) <= 3
    # Adapters, moments and step: nothing of the frozen base.
    size = sum(p.stat().st_size for p in (folder / "checkpoints" / "4").rglob("*") if p.is_file())
    assert size < 2_000_000


def test_the_adapter_reads_back(finished, make_experiment, monkeypatch):
    kept = {}
    export = Trainer._export

    def keep(self):
        export(self)
        kept["model"] = self.program.model()

    monkeypatch.setattr(Trainer, "_export", keep)
    experiment = make_experiment("again", training={"steps": 2})
    loop.run(experiment, resume=False)
    trained = kept["model"].layers.moe.w1.lora.b.get_value()
    assert np.abs(trained).max() > 0
    kept["model"].layers.moe.w1.lora.b.set_value(0 * trained)
    load_adapter(kept["model"], folder_of(experiment) / "adapter")
    np.testing.assert_array_equal(kept["model"].layers.moe.w1.lora.b.get_value(), trained)


def test_nothing_is_overwritten(finished):
    before = adapter(folder_of(finished))
    with pytest.raises(UserError, match=r"exists already.*--resume"):
        loop.run(finished, resume=False)
    other = finished.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        loop.run(other, resume=True)
    assert adapter(folder_of(finished)) == before


@pytest.mark.parametrize("batching", [pytest.param("pad_longest", marks=pytest.mark.long), "pad_bucket"])
def test_padded_batchings_train_too(batching, make_experiment):
    """One query a row, a compiled program for every length that occurs; no query more or less than packed."""
    experiment = make_experiment(
        data={"batching": batching, "buckets": [48, 64]},
        training={"steps": None, "epochs": 1, "gradient_accumulation": 1},
        adapter={"rank": 2, "targets": ["w2", "o_proj"]},
    )
    assert loop.run(experiment, resume=False) == 0
    lines = [json.loads(line) for line in (folder_of(experiment) / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["queries"] for line in lines if "loss" in line) == 52
    assert {line["padded_tokens"] for line in lines if "loss" in line} == {4 * 48}


def test_a_run_stopped_before_its_first_checkpoint_resumes_at_step_0(make_experiment, monkeypatch, capsys):
    """The untrained model is evaluated once, whenever it was stopped."""
    experiment = make_experiment(training={"steps": 2, "eval_every": 1}, data={"holdout": 4})
    for method in ("_loop", "_compile"):  # before the evaluation, and behind it
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, method, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                loop.run(experiment, resume=method == "_compile")
    assert loop.run(experiment, resume=True) == 0
    assert "before its first checkpoint: starting at step 0" in capsys.readouterr().out
    records = [json.loads(line) for line in (folder_of(experiment) / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 1, 2] and [r["step"] for r in records if "loss" in r] == [1, 2]


def test_resume_without_a_run(make_experiment):
    with pytest.raises(UserError, match="holds no run to resume"):
        loop.run(make_experiment("never"), resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(make_experiment):
    experiment = make_experiment(
        adapter=None,
        quantization={"format": "none"},
        training={"learning_rate": 1e30, "clip_norm": None},
        checkpoint={"every": 1},
    )
    with pytest.raises(UserError, match=r"step 1: .*param_norm = inf: not finite.*no checkpoint was saved yet"):
        loop.run(experiment, resume=False)
    folder = folder_of(experiment)
    assert not (folder / "model").exists() and (folder / "bad_steps" / "step-1.npz").is_file()
    assert not any(p.name.isdigit() for p in (folder / "checkpoints").iterdir())


def test_out_of_memory_is_said_before_it_happens(make_experiment, monkeypatch):
    monkeypatch.setattr(device, "usable_bytes", lambda: 2_000_000)
    with pytest.raises(UserError, match=r"asks for .* GB with 8 rows.*data\.batch_rows=\d+ would fit"):
        loop.run(make_experiment(data={"batch_rows": 8}), resume=False)


def test_full_training_writes_a_model_that_loads(make_experiment):
    experiment = make_experiment(adapter=None, quantization={"format": "none"}, training={"steps": 2})
    assert loop.run(experiment, resume=False) == 0
    model = str(folder_of(experiment) / "model")
    continued = make_experiment("continued", model={"source": model, "preset": None, "overrides": {}}, training={"steps": 2})
    assert loop.run(continued, resume=False) == 0
    assert losses(folder_of(continued))[1] < losses(folder_of(experiment))[1]


def test_only_the_batch_is_sent(make_experiment, monkeypatch):
    """The loop guards host-to-device transfers: an array that is not on the device is refused inside the step."""
    step = TrainProgram.step

    def with_host_array(self, batch):
        jax.jit(lambda a: a)(np.ones(3))
        return step(self, batch)

    monkeypatch.setattr(TrainProgram, "step", with_host_array)
    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device"):
        loop.run(make_experiment(), resume=False)


def test_continuing_from_an_adapter(make_experiment, tmp_path):
    """The continued run starts where the first one ended: the same evaluation loss to the bit, before its first step."""
    settings = {"training": {"steps": 4, "eval_every": 4}}
    assert loop.run(make_experiment("first", **settings), resume=False) == 0
    adapter_folder = str(tmp_path / "runs/first/adapter")
    onward = make_experiment("onward", adapter={"rank": 2, "alpha": 4.0, "init_from": adapter_folder}, **settings)
    assert loop.run(onward, resume=False) == 0
    first, then = (evaluations(tmp_path / "runs" / name) for name in ("first", "onward"))
    assert first[0] > first[4] == then[0] > then[4]
    wrong = make_experiment("wrong", adapter={"rank": 4, "alpha": 8.0, "init_from": adapter_folder}, **settings)
    for refuse in (lambda: loop.run(wrong, resume=False), lambda: dry_run.report(wrong)):
        with pytest.raises(UserError, match=r"has rank 4, .*set adapter\.rank"):
            refuse()
    with pytest.raises(UserError, match=r"adapter\.init_from = './nowhere': no such folder, looked for from /"):
        loop.run(make_experiment("wrong", adapter={"init_from": "./nowhere"}), resume=False)
    assert not (tmp_path / "runs/wrong").exists()
