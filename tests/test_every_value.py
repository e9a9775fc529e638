"""Every value of every key runs once, as installed. What there is to run is read from the schema: a new value without a run fails."""

import hashlib
import json
import shutil
import types
from typing import Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from support import ROOT, TINY

from moejax.config import Experiment
from moejax.data.pipeline import load as load_data
from moejax.data.tokenizer import load_tokenizer
from moejax.models.config import LORA_TARGETS
from moejax.training import loop

TOKENIZER = ROOT / "assets/tiny-mixtral/tokenizer.json"
BASE = {
    "model": {"preset": "mixtral-tiny", "overrides": {**TINY, "num_layers": 1}},
    "tokenizer": "CHAT",
    "data": {"source": "RECORDS", "row_tokens": 256, "max_length": 256, "batch_rows": 2},
    "training": {"steps": 2, "compute_dtype": "float32"},
    "device": {"compilation_cache": None},
}
WHOLE = {"adapter": None, "quantization": {"format": "none"}}
EVAL = {"task": "problems", "data": "PROBLEMS", "limit": 2, "rows": 2}
# Values that do not meet share a run. CHAT, RECORDS, NAMED … are made below.
RUNS = {
    "adapter": {
        "quantization": {"format": "nf4", "cache": None},
        "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": list(LORA_TARGETS), "share": ["w1", "w3"]},
        "data": {"template": "mistral", "batching": "pack", "holdout": 4, "records": 24, "bytes": "BYTES", "sha256": "SHA256"},
        "training": {"remat": "offload", "gradient_accumulation": 2, "accumulation": "layer_major", "label_smoothing": 0.1, "eval_every": 1,
                     "loss_chunk_tokens": 32, "on_bad_step": "skip",
                     "optimizer": "adamw_8bit"},
        "eval": {**EVAL, "each_epoch": True, "every_steps": 1, "max_new_tokens": 3},
        "checkpoint": {"every": 1, "keep": 1},
        "device": {"memory_fraction": 0.5, "tune": "off"},
        "mesh": {"devices": 1, "moments": "spread"},
    },
    "whole, bf16": {
        **WHOLE,
        "seed": 3,
        "model": {"moe_backend": "loop", "attention": "blocks", "scan": "chunked", "aux_loss_coef": 0.01, "experts_per_token": 1},
        "added_tokens": ["<extra>"],
        "data": {"template": "alpaca", "batching": "pad_longest", "too_long": "drop", "shuffle": False, "eval_source": "RECORDS"},
        "training": {
            "compute_dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "dots", "optimizer": "adafactor", "schedule": "linear",
            "accumulation": "auto",
            "min_learning_rate_ratio": 0.1, "weight_decay": 0.01, "weight_decay_on": "all", "learning_rate": 1e-3, "warmup_steps": 1,
        },
    },
    "blackmamba, stochastic": {
        **WHOLE,
        "model": {
            "preset": None, "source": "BLACKMAMBA", "moe_backend": "capacity", "overrides": {}, "revision": "main",
            "ignored_settings": ["x"], "scan": "chunked_associative",
        },
        "data": {
            "source": "NAMED", "config_name": "main", "split": "some", "template": "chat", "batching": "pad_bucket", "buckets": [128, 256],
            "streaming": True,
        },
        "training": {
            "param_dtype": "bfloat16_stochastic", "remat": "none", "schedule": "constant", "steps": None, "epochs": 1, "clip_norm": None,
            "betas": [0.8, 0.99], "eps": 1e-6,
        },
        "checkpoint": {"best": False, "resume_with_changed": ["data"]},
        "eval": {**EVAL, "data": "NAMED", "split": "some", "limit": None, "metric": "loss", "allow_overlap": True},
        "device": {"compilation_cache": "CACHE", "tune": "full"},
    },
    "random rows": {
        "tokenizer": None,
        "quantization": {"format": "nf4", "double": False, "modules": ["experts"]},
        "model": {"download": "stream"},
        "adapter": {"token_rows": [5, 7]},
        "data": {"source": None, "batching": "fixed"},
        "training": {"remat": "auto", "steps": 4, "optimizer": "lion", "moments_dtype": "bfloat16"},
        "logging": [],  # wandb: tests/training/test_wandb_run.py
        "placement": {"experts": 1},
        "profile": {"start_step": 2, "steps": 1},
    },
    "text, continued": {
        "adapter": {"rank": 2, "alpha": 4.0, "targets": list(LORA_TARGETS), "init_from": "ADAPTER"},
        "placement": {"experts": "host", "tables": "host", "prefetch": "experts"},
        "data": {
            "template": "text", "max_length": 32, "too_long": "split",
            "fields": {"text": "output", "instruction": "output", "input": "output", "output": "input", "messages": "input"},
        },
    },
    "preferences, robust": {
        "data": {"source": "PAIRS", "max_length": 128, "fields": {"chosen": "output", "rejected": "worse"}, "holdout": 4, "batch_rows": 4},
        "adapter": {"rank": 2, "alpha": 4.0}, "training": {"eval_every": 1},
        "placement": {"experts": "auto", "prefetch": "layer"},
        "preference": {"loss": "robust", "beta": 0.5, "label_smoothing": 0.1},
        "mesh": {"weights": "experts"},
    },
    "preferences, sigmoid": {
        "data": {"source": "PAIRS", "max_length": 128, "fields": {"chosen": "output", "rejected": "worse"}, "batching": "pad_longest"},
        "adapter": {"rank": 2, "alpha": 4.0}, "preference": {"loss": "sigmoid", "label_smoothing": 0.1},
    },
    "preferences, ipo": {
        "data": {"source": "PAIRS", "max_length": 128, "fields": {"chosen": "output", "rejected": "worse"}, "batch_rows": 4},
        "adapter": {"rank": 2, "alpha": 4.0}, "preference": {"loss": "ipo"}, "mesh": {"weights": "spread"},
    },
    "conversations, whole": {
        **WHOLE, "data": {"source": "TALKS", "turns": "whole", "train_on": {"roles": ["assistant", "user"]}, "template_date": "2026-01-02"},
    },
    "conversations, split": {
        **WHOLE,
        "added_tokens": ["<|im_start|>", "<|im_end|>"],
        "data": {"source": "TALKS", "template": "chatml", "turns": "split", "template_args": {"enable_thinking": False}},
    },
    "conversations, last": {**WHOLE, "data": {"source": "TALKS", "turns": "last", "train_on": {"last_turn": True}}},
}  # fmt: skip


ELSEWHERE = {("model.attention", "flash"), ("model.scan", "kernel"), ("model.moe_backend", "ragged"), ("model.moe_backend", "decode")}
"""Refused on a CPU: tests/training/test_experts.py."""
ELSEWHERE |= {(f"mesh.{key}", "SET") for key in ("coordinator", "processes", "process_id")}  # of several processes


def merged(base, changes):
    """The changes over the base, section by section; {} is empty."""
    both = isinstance(base, dict) and isinstance(changes, dict) and changes
    return {k: merged(base.get(k), changes[k]) if k in changes else base[k] for k in {**base, **changes}} if both else changes


def leaves(section, at=()):
    """(dotted key, annotation without None, whether it may be null, default) of every key of the schema, sections too."""
    for name, info in section.model_fields.items():
        if name in ("made_of", "vocabulary"):  # the run writes them
            continue
        union = get_origin(info.annotation) in (Union, types.UnionType)
        parts = [a for a in (get_args(info.annotation) if union else [info.annotation]) if a is not type(None)]
        null = union and type(None) in get_args(info.annotation)
        kind = parts[0] if len(parts) == 1 else Union[tuple(parts)]  # noqa: UP007
        yield ".".join((*at, name)), kind, null, info.get_default(call_default_factory=True)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, (*at, name))


def words_of(kind):
    """Of a choice, or of one next to another kind of value."""
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else [kind]
    return {word for part in parts if get_origin(part) is Literal for word in get_args(part)}


def values_to_run():
    """{key: what has to occur in some run}: words of a choice (and what is none), true and false, null and something, and something else
    than the default."""
    found = {}
    for key, kind, null, default in leaves(Experiment):
        if words_of(kind):
            found[key] = words_of(kind) | (set() if get_origin(kind) is Literal else {("NONE OF", *sorted(words_of(kind)))})
        elif kind is bool:
            found[key] = {True, False}
        else:
            found[key] = {"SET"}
        found[key] |= {None} if null else set()
        if found[key] == {"SET"} and not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            found[key] = {("NOT", repr(default))}
    return found


def seen_in(experiments):
    """The same for what these experiments hold."""
    seen = {}
    for experiment in experiments:
        for key in values_to_run():
            value = experiment
            for part in key.split("."):
                value = None if value is None else getattr(value, part)
            seen.setdefault(key, []).append(value)
    return seen


def test_every_value_has_a_run():
    runs = json.loads(json.dumps([*RUNS.values()]).replace('"BYTES"', "1"))
    made = [Experiment.model_validate({"name": "x", "runs_dir": "somewhere"} | merged(BASE, run)) for run in runs]
    missing = []
    for key, wanted in values_to_run().items():
        held = seen_in(made)[key]
        for value in wanted:
            if value == "SET":
                ok = any(h is not None for h in held)
            elif isinstance(value, tuple) and value[0] == "NONE OF":
                ok = any(h not in value[1:] for h in held if h is not None)
            elif isinstance(value, tuple):
                ok = any(repr(h) != value[1] for h in held if h is not None)
            else:
                ok = any(h is value or h == value for h in held)
            if not ok and (key, value) not in ELSEWHERE:
                missing.append((key, value))
    assert not missing


def test_every_word_is_documented():
    text = "".join((ROOT / "docs" / name).read_text() for name in ("training.md", "data.md"))
    for key, kind, _, _ in leaves(Experiment):
        for word in words_of(kind):
            assert f"`{word}`" in text, f"{key}={word} stands in neither docs/training.md nor docs/data.md"


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """What the words in capitals stand for, on disk."""
    folder = tmp_path_factory.mktemp("values")
    records = json.loads((ROOT / "assets/problems/train.json").read_text())[:24]
    (folder / "records.json").write_text(json.dumps(records))
    chat = folder / "chat"
    shutil.copytree(ROOT / "assets/tiny-mixtral", chat, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    settings = json.loads((chat / "tokenizer_config.json").read_text())
    user = "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    turns = f"{{% for m in messages %}}{user}{{% endfor %}}"
    (chat / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": turns}))
    named = folder / "named"
    named.mkdir()
    (named / "some.jsonl").write_text("\n".join(json.dumps(r) for r in records[:4]))
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: some\n    path: some.jsonl\n---\n"
    (named / "README.md").write_text(card)
    says = ("user", "instruction"), ("assistant", "output")
    talks = [{"messages": [{"role": role, "content": r[key]} for r in records[at : at + 3] for role, key in says]} for at in range(9)]
    (folder / "talks.json").write_text(json.dumps(talks))
    (folder / "pairs.json").write_text(json.dumps([r | {"worse": f"{r['answer']}?"} for r in records]))
    content = (folder / "records.json").read_bytes()
    return {
        "RECORDS": str(folder / "records.json"), "TALKS": str(folder / "talks.json"), "CHAT": str(chat), "NAMED": str(named),
        "PAIRS": str(folder / "pairs.json"), "BLACKMAMBA": str(ROOT / "assets/tiny-blackmamba"),
        "PROBLEMS": str(ROOT / "assets/problems/test.json"), "ADAPTER": str(folder / "runs/adapter/adapter"),
        "CACHE": str(folder / "cache"), "SHA256": hashlib.sha256(content).hexdigest(), "BYTES": len(content), "runs": str(folder / "runs"),
    }  # fmt: skip


def experiment_of(name, changes, places):
    text = json.dumps(merged(BASE, changes))
    for word, place in places.items():
        text = text.replace(f'"{word}"', json.dumps(place))
    return Experiment.model_validate({"name": name.replace(", ", "-").replace(" ", "-"), "runs_dir": places["runs"], **json.loads(text)})


@pytest.mark.parametrize("template", ["mistral", "alpaca", "chat", "text"])
@pytest.mark.parametrize("batching", ["pack", "pad_longest", "pad_bucket", "fixed"])
def test_every_template_makes_every_batch(template, batching, places):
    data = {"template": template, "batching": batching, "buckets": [256], "fields": {"text": "output"} if template == "text" else {}}
    experiment = experiment_of("data", {"data": data}, places)
    dataset = load_data(experiment.data, load_tokenizer(experiment.tokenizer), 0, 512)
    batch = next(iter(dataset.train.iterate(0)))
    assert dataset.tokenized.records == 24 and batch.loss_mask.sum() > 0


@pytest.mark.parametrize(("name", "queries"), [("whole", 9), ("split", 27), ("last", 9)])
def test_conversations_make_batches(name, queries, places):
    experiment = experiment_of("data", RUNS[f"conversations, {name}"], places)
    tokenizer = load_tokenizer(experiment.tokenizer, experiment.added_tokens)
    dataset = load_data(experiment.data, tokenizer, 0, 512)
    assert len(dataset.train.queries) == queries and dataset.tokenized.talks.conversations == 9


@pytest.mark.long
def test_the_runs(places, monkeypatch, tmp_path):
    """In their order: one continues another's adapter."""
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, changes in RUNS.items():
        assert loop.run(experiment_of(name, changes, places), resume=False) == 0, name
