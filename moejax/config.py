"""The experiment: one strict schema. `config_file` reads it and says what is wrong with it. No jax here."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from moejax.config_data import DataConfig
from moejax.config_file import apply, explain, put, read
from moejax.config_mesh import MeshConfig
from moejax.config_model import AdapterConfig, ModelConfig, QuantizationConfig
from moejax.config_preference import PreferenceConfig
from moejax.config_training import PlacementConfig, TrainingConfig
from moejax.config_values import Names, Place, Positive, Real, Section, as_tuple
from moejax.contents import MadeOf, Part
from moejax.errors import UserError
from moejax.models.config import Architecture

AUTO_TOKENS = ("auto",)
"""`added_tokens: auto`."""


def _tokens(value: Any) -> Any:
    return AUTO_TOKENS if value == "auto" else as_tuple(value)


UNTRACED_STEPS = 5  # that `moejax profile` runs for the step's seconds, after the traced ones


class CheckpointConfig(Section):
    """Checkpoints: every n steps, the last `keep` of them, and the best by evaluation loss. The last step is always saved."""

    every: Positive | None = None
    keep: Positive = 2
    best: bool = True
    resume_with_changed: Annotated[tuple[Part, ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="inputs that may differ when a run is resumed: data, base, tokenizer, …"
    )


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class DeviceConfig(Section):
    """memory_fraction: share of the GPU's memory that jax may take (jax's own default of 0.75 would leave a quarter unused).

    compilation_cache: where jax keeps compiled programs for the next start; null: nowhere. What another version of jax, another
    device or another program left there is not found, and compiled again.

    tune: at the first start on a card its kernels are measured at the run's shapes (`moejax tune`): auto: quickly, on a GPU; full: all of
    them, on a CPU too; off: never, and what was measured is passed over.
    """

    memory_fraction: Annotated[Real, Field(gt=0, le=1)] = 0.92
    compilation_cache: str | None = "~/.cache/moejax/xla"
    tune: Annotated[Literal["auto", "off", "full"], BeforeValidator(_off)] = "auto"


class ProfileConfig(Section):
    """Trace `steps` optimizer steps from `start_step` on (counted from 1). Step 1 compiles and is never traced."""

    start_step: int = 5
    steps: int = 3

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.start_step < 2:
            raise ValueError(f"start_step = {self.start_step}: step 1 compiles and cannot be traced: expected 2 or more")
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: expected 1 or more")
        return self

    @property
    def last_step(self) -> int:
        return self.start_step + self.steps - 1

    def check(self, total_steps: int) -> None:
        """Raises ValueError if a run of this many steps ends before the traced ones do."""
        if self.last_step > total_steps:
            raise ValueError(
                f"profile traces steps {self.start_step} to {self.last_step}, but the run has {total_steps}: lower "
                "profile.start_step or profile.steps, or train longer"
            )


class EvalConfig(Section):
    """Right answers counted on held-out problems while it trains.

    Score the untrained model, then as `each_epoch` and `every_steps` say, and the model at the end.
    """

    task: str = Field(description="task (prompts and scoring rule) by name: see moejax eval")
    data: Place = Field(description="held-out problems: a file, a folder or a glob of files, or a name for `datasets`")
    split: str | None = None
    limit: Positive | None = Field(None, description="number of problems to use; null: all")
    each_epoch: bool = False
    every_steps: Positive | None = None
    max_new_tokens: Positive | None = Field(None, description="maximum length of an answer; null: set by the task")
    rows: Positive = Field(64, description="batch size")
    metric: Literal["accuracy", "loss"] = Field("accuracy", description="metric that selects the model in best/")
    allow_overlap: bool = Field(False, description="continue where held-out problems are in the training data too")


class Experiment(Section):
    """One run. Its folder is runs_dir/name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    runs_dir: Place = "runs"
    model: ModelConfig
    quantization: QuantizationConfig = QuantizationConfig()
    adapter: AdapterConfig | None = None
    tokenizer: Place | None = Field(None, description="tokenizer.json, folder or Hub id; null: the model's")
    added_tokens: Annotated[Names, BeforeValidator(_tokens)] = Field(
        (),
        description="special tokens added after the tokenizer's own, in this order; </s> ends a sequence, [PAD] pads; with an adapter "
        "their rows of embedding and head are trained; auto: the missing ones of data.template=chatml",
    )
    data: DataConfig
    training: TrainingConfig
    preference: PreferenceConfig | None = Field(None, description="train on preferences (DPO); null: on answers")
    eval: EvalConfig | None = Field(None, description="scoring of answers during training; null: none")
    logging: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(as_tuple)] = Field(
        ("tensorboard",), description="further destinations of metrics (always: metrics.jsonl); wandb needs the extra `wandb`"
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    placement: PlacementConfig = PlacementConfig()
    device: DeviceConfig = DeviceConfig()
    mesh: MeshConfig | None = Field(None, description="several devices; null: one")
    profile: ProfileConfig | None = Field(None, description="steps to trace; null: none")
    made_of: MadeOf | None = Field(None, description="written by the run: hashes of its inputs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.quantization.format != "none" and self.adapter is None:
            raise ValueError(
                "quantization freezes the weights and there is no adapter: nothing would be trained. Add adapter: {}"
            )
        if self.model.download == "stream" and (self.quantization.format == "none" or self.quantization.cache is None):
            raise ValueError(
                f"model.download = stream keeps what it quantized, and quantization.format = {self.quantization.format}, "
                f"quantization.cache = {self.quantization.cache or 'null'}: expected nf4 and a folder, or model.download=whole (weights "
                "that are not quantized take as much disk as the shards)"
            )
        if self.training.param_dtype == "bfloat16_stochastic" and self.adapter is not None:
            raise ValueError("training.param_dtype = bfloat16_stochastic is of a model that is trained whole: adapters are in fp32")
        for what in ("experts", "tables"):
            if self.adapter is None and getattr(self.placement, what) != "device":
                raise ValueError(
                    f"placement.{what} = {getattr(self.placement, what)}: only frozen weights can lie in the host's memory, and without an "
                    "adapter all are trained. Add adapter: {}, or set it to device"
                )
        if self.placement.prefetch == "experts" and self.model.moe_backend in ("capacity", "ragged", "decode"):
            raise ValueError(
                f"placement.prefetch = experts: model.moe_backend = {self.model.moe_backend} multiplies a layer at once: set "
                "prefetch=layer, or that to loop"
            )
        if self.preference is not None:
            self.preference.check(self)
            if self.training.accumulation == "layer_major":
                raise ValueError("training.accumulation = layer_major: the pairs of a micro-batch are compared with each other: expected "
                                 "micro_batch_major or auto with preference")
        if self.mesh is not None:
            self.mesh.check(self)
        if self.data.source is not None and self.tokenizer is None and self.model.source is None:
            raise ValueError("tokenizer is missing: a model with random weights brings none")
        if not all(token.strip() for token in self.added_tokens):
            raise ValueError(f"added_tokens = {list(self.added_tokens)}: expected tokens of more than white space")
        if set(AUTO_TOKENS) < set(self.added_tokens):
            raise ValueError(f"added_tokens = {list(self.added_tokens)}: auto stands alone: name ChatML's two, <|im_start|> and <|im_end|>")
        if self.added_tokens == AUTO_TOKENS and self.data.template != "chatml":
            raise ValueError(
                f"added_tokens = auto: data.template = {self.data.template or 'null'} needs no tokens by name, chatml does: name the tokens"
            )
        if self.profile is not None and self.training.steps is not None:
            self.profile.check(self.training.steps)
        if self.model.preset is not None:
            sizes = self.model.architecture(None)
            limit = sizes.max_position_embeddings
            if self.data.longest_text > limit:
                raise ValueError(f"rows of {self.data.longest_text} tokens exceed the model's max_position_embeddings = {limit}")
            self.kinds(sizes)
            self.placement.check(sizes.expert_layers)
            if self.mesh is not None and self.mesh.devices is not None:
                self.mesh.check_experts(self.mesh.devices, sizes.num_experts)
            if self.adapter is not None and sizes.target_names:
                self.adapter.lora.of(sizes)
        return self

    @property
    def method(self) -> Literal["full", "qlora", "lora"]:
        """How it trains, as step_profile.json calls it."""
        return "full" if self.adapter is None else "qlora" if self.quantization.format != "none" else "lora"

    def changed(self, section: str, **values: Any) -> Self:
        """The same with other values in a section. They are not checked again."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})

    def with_defaults(self, sizes: Architecture) -> Self:
        """The same with what the family decides in the place of null: where adapters are, and what is quantized."""
        settled = self
        if self.adapter is not None and self.adapter.targets is None:
            settled = settled.changed("adapter", targets=sizes.default_targets)
        if self.quantization.modules is None:
            settled = settled.changed("quantization", modules=sizes.resolve_groups(None))
        return settled

    def check_model(self, sizes: Architecture) -> None:
        """Raises ValueError for an architecture of which the config asks what it has not, or what cannot be trained on it."""
        self.placement.check(sizes.expert_layers)
        if self.mesh is not None and self.mesh.devices is not None:
            self.mesh.check_experts(self.mesh.devices, sizes.num_experts)
        if self.adapter is not None and not sizes.target_names:
            missing = [name for name in self.adapter.targets or () if name not in sizes.targets]
            why = f"it has no {', '.join(missing)}" if missing else "no format is known that an adapter on it could be saved in"
            of_pairs = "" if self.preference is None else ", and preference, which needs an adapter"
            raise ValueError(
                f"adapter: a {sizes.title} is trained whole here ({why}): remove the adapter and quantization sections{of_pairs}"
            )
        if self.adapter is not None:
            try:
                self.adapter.lora.of(sizes)
            except ValueError as error:
                raise ValueError(f"adapter: {error}") from None
        try:
            self.kinds(sizes)
        except ValueError as error:
            raise ValueError(f"quantization: {error}") from None

    def kinds(self, sizes: Architecture) -> dict[str, str]:
        """Group of weights (attention, experts, router) -> how it is stored in 4 bits, of `moejax.models.ops.quantized.KINDS`. Raises
        ValueError for experts that the config quantizes and the model's files have in 4 bits already."""
        found = sizes.kinds(self.quantization.kind, self.quantization.modules)
        return {} if self.adapter is None else found


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment from YAML, with `key.sub=value` overrides (values are YAML). Raises UserError for every mistake."""
    return _validated(read(path, overrides), path)


def of(content: Mapping[str, Any], name: str, changes: Mapping[str, Any] | Sequence[str] = ()) -> Experiment:
    """An experiment from its content, e.g. `yaml.safe_load` of a file, with changes as {"training.steps": 10} or as `load` takes them.
    name: in messages. Raises UserError for every mistake."""
    made = copy.deepcopy(dict(content))
    for change in changes.items() if isinstance(changes, Mapping) else changes:
        if isinstance(change, str):
            apply(made, change)
        else:
            put(made, *change, f"change {change[0]!r}")
    return _validated(made, name)


def load_profiled(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment as `moejax profile` runs it: NAME-profile, and just the steps that are needed.

    After the traced steps come one that is not counted (the trace is written in it) and `UNTRACED_STEPS` for step_seconds. What an
    override names (name, training.steps) stays as it is. Warm-up and evaluation have no place in so short a run.
    """
    content = read(path, overrides)
    named = {override.partition("=")[0] for override in overrides}
    content |= {"profile": {} if content.get("profile") is None else content["profile"], "eval": None}
    if "name" not in named and isinstance(content.get("name"), str):
        content["name"] += "-profile"
    training, profile = content.get("training"), content["profile"]
    if isinstance(training, dict) and isinstance(profile, dict):
        training |= {"warmup_steps": 0, "eval_every": None}
        start, steps = profile.get("start_step", 5), profile.get("steps", 3)
        if "training.steps" not in named and isinstance(start, int) and isinstance(steps, int):
            training["steps"] = max(1, start + steps - 1) + 1 + UNTRACED_STEPS
    return _validated(content, path)


def _validated(content: dict[str, Any], path: str | Path) -> Experiment:
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Experiment)}") from None


def dump(experiment: Experiment) -> str:
    """The experiment as YAML with every default visible; loading it gives the same experiment."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
