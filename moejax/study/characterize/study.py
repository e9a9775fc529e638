"""What is studied: every config with every routing, resolved to plain data that the results keep and the child processes read back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import TypeAdapter

from moejax import config as experiments
from moejax import gpus, installation
from moejax.config import Experiment
from moejax.config_data import whole_row
from moejax.data.batching import Batches
from moejax.data.places import is_here
from moejax.errors import UserError, first_line
from moejax.estimator import closed_form, lengths, memory, sizes
from moejax.estimator.sizes import architecture_of
from moejax.models.config import Architecture
from moejax.study.characterize.presets import PRESETS, Preset, Sizes, override
from moejax.study.reference import REFERENCE
from moejax.study.report.results import Model

if TYPE_CHECKING:
    from moejax.data.tokenize import Query

DATASETS = {"cs": "commonsense_15k", "math": "math_14k"}  # of which the study's lengths are known
ANSWER = 1 / 3  # of a random query: what is supervised


@dataclass(frozen=True)
class Setting:
    """One model with one data set and one routing. random_*: not from a file.

    longest: tokens of the longest query, rounded up to 8. run_queries: of the config's whole run, all epochs, held-out ones not counted.
    """

    model: str
    family: Literal["mixtral", "blackmamba"] | None
    method: Literal["qlora", "lora", "full"]
    routing: Literal["sparse", "dense"]
    data: Literal["cs", "math", "problems", "fixed", "other"]
    random_weights: bool
    random_data: bool
    longest: int
    run_queries: int
    experiment: Experiment

    @property
    def key(self) -> str:
        return f"{self.model}/{self.data}/{self.routing}"

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.experiment)

    def closed_form_rows(self, row_tokens: int, limit: float, platform: gpus.Platform) -> int:
        """How many rows fit into `limit` bytes by arithmetic, at most `memory.ROWS_LIMIT` less 1 (a toy on a GPU)."""

        def peak(rows: int) -> int:
            return closed_form.breakdown(self.experiment, self.architecture, rows=rows, row_tokens=row_tokens, platform=platform).total

        most = memory.ROWS_LIMIT - 1
        return most if peak(most) <= limit else memory.largest_rows(peak, limit).rows

    def fits_on(self, gpu: gpus.GPU) -> int:
        """Queries of the longest length that surely fit on a GPU of the table by the closed form; 0 where a run would be refused."""
        if self.experiment.training.asks_bf16 and not gpu.bf16:
            return 0
        sure, _ = memory.by_closed_form(memory.usable_bytes(gpu, self.experiment.device.memory_fraction))
        return self.closed_form_rows(self.longest, sure, closed_form.platform_of(gpu))

    def queries(self, at_least: int = 1) -> list[Query]:
        """The tokenized queries; of random ones this many, with the lengths of the study's data set."""
        from moejax.data import pipeline
        from moejax.data.tokenize import Query
        from moejax.data.tokenizer import load_tokenizer

        e, vocabulary = self.experiment, self.architecture.vocab_size
        if not self.random_data:
            source = e.tokenizer or str(e.model.source)
            tokenizer = None if e.data.source is None else load_tokenizer(source, e.added_tokens)
            return list(pipeline.load(e.data, tokenizer, e.seed, vocabulary).tokenized.queries)
        known = lengths.of_study(DATASETS[self.data])
        random = np.random.default_rng(e.seed)
        drawn = random.choice(known.tokens, at_least, p=known.counts / known.counts.sum())
        drawn = np.minimum(drawn, e.data.max_length)
        return [Query.after(int(n * (1 - ANSWER)), random.integers(0, vocabulary, n).astype(np.int32)) for n in drawn.tolist()]


@dataclass(frozen=True)
class Study:
    """Settings and sizes, and the bytes that a step may take where that is not the device's own limit."""

    settings: tuple[Setting, ...]
    sizes: Sizes
    memory_limit: int | None

    def first_data(self) -> tuple[Setting, ...]:
        """Of each model and routing the setting with its first data set: for what does not depend on the data."""
        found: dict[tuple[str, str], Setting] = {}
        for s in self.settings:
            found.setdefault((s.model, s.routing), s)
        return tuple(found.values())

    def models(self) -> list[Model]:
        """As the results name them."""
        found = {}
        for s in self.settings:
            total = sum(w.size for w in sizes.stored(s.experiment, s.architecture) if not w.adapter)
            weights = "random" if s.random_weights else str(s.experiment.model.source)
            found[s.model] = Model(s.model, s.family, s.method, weights, total)
        return list(found.values())

    def config(self) -> dict[str, Any]:
        """Everything that decides what is run, as plain JSON data."""
        settings = _SETTINGS.dump_python({s.key: s for s in self.settings}, mode="json")
        return {"sizes": _SIZES.dump_python(self.sizes, mode="json"), "memory_limit": self.memory_limit, "settings": settings}


_SETTINGS, _SIZES = TypeAdapter(dict[str, Setting]), TypeAdapter(Sizes)


def from_config(config: dict[str, Any]) -> Study:
    """The study that `Study.config` described."""
    settings, sizes_ = _SETTINGS.validate_json(json.dumps(config["settings"])), _SIZES.validate_json(json.dumps(config["sizes"]))
    return Study(tuple(settings.values()), sizes_, config["memory_limit"])


def resolve(
    preset: str | None, files: Sequence[str], overrides: Sequence[str], memory_limit: int | None, pretrained: bool
) -> Study:
    """The study that a command line asks for. Raises UserError."""
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
    if preset is None and not files:
        raise UserError(f"what is to be characterized? Give a CONFIG (`moejax init` writes one), or --preset {' | '.join(PRESETS)}")
    known: Preset | None = PRESETS[preset] if preset else None
    sizes_, overrides = override(known.sizes if known else Sizes(), overrides)
    given = bool(files)
    if not files:
        assert known is not None
        files = [str(installation.CONFIGS / f"{name}.yaml") for name in known.configs]
    if memory_limit is None and known:
        memory_limit = known.memory_limit
    settings: dict[str, Setting] = {}
    for file in files:
        try:
            experiment = experiments.load(file, overrides)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {file}: {first_line(error)}: expected a YAML file that can be read") from None
        if not given:
            experiment = _of_checkout(experiment)
        only_sparse = not given and known is not None and Path(file).stem in known.only_sparse and "sparse" in sizes_.routings
        for routing in ("sparse",) if only_sparse else sizes_.routings:
            s = _setting(experiment, routing, pretrained)
            if s.key in settings:
                raise UserError(f"--config {file}: {s.key} is there already: give configs of different models or data")
            settings[s.key] = s
    return Study(tuple(settings.values()), sizes_, memory_limit)


def _of_checkout(experiment: Experiment) -> Experiment:
    """A preset works from any folder: the bundled files that its configs name are the checkout's. Raises UserError in a wheel."""
    root = installation.checkout()

    def found(path: str | None) -> str | None:
        if path is None or not path.startswith("assets/") or Path(path).exists():
            return path
        if root is None:
            raise UserError(f"this preset needs {path}, which is in a checkout of moejax and no wheel: give --config FILE, or run it there")
        return str(root / path)

    model, data = experiment.model, experiment.data
    model = model.model_copy(update={"source": found(model.source)})
    if isinstance(data.source, str):
        data = data.model_copy(update={"source": found(data.source)})
    return experiment.model_copy(update={"model": model, "data": data, "tokenizer": found(experiment.tokenizer)})


def _setting(experiment: Experiment, routing: str, pretrained: bool) -> Setting:
    source, data = experiment.model.source, experiment.data
    whole = experiment.model_copy(update={"data": data.model_copy(update={"eval_source": None})})
    base = architecture_of(experiment)
    sparse = max(1, base.num_experts // 4) if base.dense else base.experts_per_token  # of a dense model the study's 2 of 8
    k = base.num_experts if routing == "dense" else sparse
    updates = {
        "model": experiment.model.model_dump(mode="json") | {"experts_per_token": k},
        # A batch is what one step takes at once; nothing is evaluated, saved or traced but by the trials themselves.
        "training": experiment.training.model_dump(mode="json") | {"gradient_accumulation": 1, "eval_every": None}
        | ({"remat": "full"} if experiment.training.remat == "auto" else {}),  # which the largest batch needs
        "profile": None,
        "preference": None,  # supervised training, whose loss the study has
        "data": data.model_dump(mode="json") | {"holdout": 0, "eval_source": None},
    }
    experiment = Experiment.model_validate_json(json.dumps(experiment.model_dump(mode="json") | updates))
    label = _data_label(data.named or None)
    random_data = not pretrained and not all(is_here(one.source) for one in data.sources)
    if random_data and label not in DATASETS:
        raise UserError(
            f"data.source = {data.named} is no file here. --pretrained downloads it; a path (data.source=PATH) reads it. Without either "
            "only commonsense_15k and math_14k can stand in, as random tokens with their published lengths"
        )
    content: dict[str, Any] = dict(
        model=Path(source).name if source and Path(source).is_dir() else experiment.model.preset or str(source),
        family=base.model_type if base.model_type in REFERENCE else None,
        method=experiment.method,
        routing=routing, data=label, random_weights=source is None or (not pretrained and not Path(source).is_dir()),
        random_data=random_data, experiment=experiment,
    )  # fmt: skip
    s = Setting(**content, longest=0, run_queries=0)
    return replace(s, longest=_longest(s), run_queries=_run_queries(replace(s, experiment=whole)))


def _data_label(source: str | None) -> Literal["cs", "math", "problems", "fixed", "other"]:
    if source is None:
        return "fixed"
    if "problems/" in source:
        return "problems"
    name = Path(source).stem  # the study's own sets by their whole name: another's math.json has other lengths
    return "cs" if name == DATASETS["cs"] else "math" if name == DATASETS["math"] else "other"


def _run_queries(s: Setting) -> int:
    """Of the whole run; s: with the config as it was given."""
    d, t = s.experiment.data, s.experiment.training
    if s.random_data:
        queries = s.queries((d.records or lengths.of_study(DATASETS[s.data]).counts.sum()) - d.holdout)
    else:
        queries = s.queries()  # what is held out is not among them
    if t.steps is None:
        return len(queries) * (t.epochs or 1)
    return round(t.steps * t.gradient_accumulation * len(queries) / Batches(queries, d, s.experiment.seed).batches_per_epoch(0))


def _longest(s: Setting) -> int:
    if s.random_data:
        known = lengths.of_study(DATASETS[s.data])
        longest = min(known.longest, s.experiment.data.max_length)
    else:
        longest = max(len(q.ids) for q in s.queries())
    return whole_row(longest)
