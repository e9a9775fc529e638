"""The sections that say what is trained: the model, how its frozen weights are stored, its adapter."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from moejax.config_file import nearest
from moejax.config_values import Names, Place, Positive, Real, Section, as_tuple, number
from moejax.errors import UserError
from moejax.models.config import FAMILIES, LORA_TARGETS, PRESETS, QUANTIZED_MODULES, Architecture, LoRAConfig, target_aliases


class ModelConfig(Section):
    """Which model. `source`: a Hub id or a folder in Hub layout; null: random weights in the architecture of `preset`."""

    source: Place | None = None
    revision: str | None = None
    download: Literal["whole", "stream"] = Field(
        "whole", description="download of a Hub model; stream: fetch, quantize (into quantization.cache) and delete one shard at a time"
    )
    preset: str | None = Field(None, description="architecture by name: without a source, or for --dry-run without a network")
    overrides: dict[str, Annotated[int | float | bool | str, BeforeValidator(number)]] = Field(
        default_factory=dict, description="fields of the architecture by name"
    )
    vocabulary: Positive | None = Field(
        None, description="rows of embedding and head, where more than the source's: written by a run with added_tokens"
    )
    experts_per_token: Positive | None = Field(None, description="k; null: the model's own; all experts: the dense model")
    moe_backend: Literal["auto", "loop", "capacity", "ragged", "decode"] = Field(
        "auto", description="ragged: for TPUs; decode: kernels for GPUs that multiply by 4-bit codes, for small batches, not yet timed"
    )
    attention: Literal["auto", "blocks", "flash"] = Field(
        "auto", description="blocks of queries by XLA, or jax's flash attention for GPUs and TPUs; auto: flash where it can run"
    )
    scan: Literal["auto", "chunked", "chunked_associative", "kernel"] = Field(
        "auto", description="the form of Mamba's selective scan; auto: measured, or by a rule; kernel: for GPUs, not yet timed"
    )
    aux_loss_coef: Annotated[Real, Field(ge=0)] = Field(0.0, description="weight of the load-balancing loss")
    ignored_settings: Names = Field((), description="keys of the source's config.json to ignore although moejax does not compute them")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source is None and self.preset is None:
            raise ValueError("give model.source (a Hub id or a folder) or model.preset (random weights)")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset = {self.preset!r} is unknown: {nearest(self.preset, PRESETS)}")
        families = FAMILIES.values() if self.preset is None else (type(PRESETS[self.preset]),)
        fields = {name for family in families for name in family.sizes()}
        for name in self.overrides:
            if name not in fields:
                raise ValueError(f"overrides.{name} is no field of the architecture: {nearest(name, fields)}")
        if self.preset is not None:
            self.architecture(None)
        return self

    def architecture(self, base: Architecture | None) -> Architecture:
        """The sizes of `base` (read from the source) or else of the preset, with overrides. Raises ValueError, UserError."""
        if base is None:
            if self.preset is None:
                raise UserError(
                    f"model.source = {self.source!r} is no folder here, and nothing is downloaded to learn its sizes: "
                    f"add model.preset (one of {', '.join(PRESETS)}), or give the folder of a downloaded copy"
                )
            base = PRESETS[self.preset]
        unknown = sorted(set(self.overrides) - set(base.sizes()))
        if unknown:
            raise ValueError(f"overrides.{unknown[0]} is no field of a {base.title}")
        asked = {} if self.experts_per_token is None else {"experts_per_token": self.experts_per_token}
        sizes = base.replace(**(asked | self.overrides))  # at once: neither is judged by the sizes that the other changes
        if self.vocabulary is None:
            return sizes
        new = self.vocabulary - sizes.vocab_size
        if new < 0:
            raise ValueError(f"vocabulary = {self.vocabulary}: the embedding has {sizes.vocab_size} rows: expected as many, or more")
        return sizes.replace(vocab_size=self.vocabulary, new_rows=new)


class QuantizationConfig(Section):
    """Storage of frozen weights. nf4: 4 bits, bit-identical to bitsandbytes; `double`: block scales in 8 bits too. Experts that a model's
    files have in MXFP4 stay in it, whatever `format` is.

    cache: where quantized weights are kept for the next start (of checkpoints of 1 GB or more); null: nowhere.
    """

    format: Literal["none", "nf4"] = "none"
    double: bool = True
    modules: Names | None = Field(
        default=None,
        description="some of attention, experts, router; null: attention, experts that are not in 4 bits already, and for a Mixtral the "
        "router",
    )
    cache: str | None = "~/.cache/moejax/quantized"

    @property
    def kind(self) -> str | None:
        """One of `moejax.models.ops.quantized.KINDS`; None: nothing is quantized."""
        return None if self.format == "none" else self.format + "-double" * self.double

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.modules == ():
            raise ValueError(f"modules = []: expected some of {', '.join(QUANTIZED_MODULES)}; quantization.format=none quantizes nothing")
        for name in self.modules or ():
            if name not in QUANTIZED_MODULES:
                raise ValueError(f"modules: {name!r} is unknown: {nearest(name, QUANTIZED_MODULES)}")
        return self


class AdapterConfig(Section):
    """LoRA: a pair A, B per expert and target; delta = alpha/rank · B A."""

    rank: Positive | dict[str, Positive] = Field(default=16, description="one, or one per target or group: {experts: 4, attention: 16}")
    alpha: Real | dict[str, Real] = Field(default=32.0, description="one, or one per target or group; delta = alpha/rank · B A, as in PEFT")
    dropout: Real = 0.0
    targets: Names | None = Field(
        None,
        description="by PEFT's names: q_proj, …, gate (the router), and of the experts w1, w2, w3 or as the model's files have it "
        "gate_proj, down_proj, up_proj; null: of a Mixtral w1, w2, w3 and gate, as in the study, of others attention and experts",
    )
    share: Names | None = Field(
        None, description="[w1, w3]: one A for both, as PEFT 0.19 and later train fused experts; null: each its own, as PEFT 0.18"
    )
    token_rows: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] | None = Field(
        None, description="ids of tokens whose rows of embedding and head are trained too: written by a run with added_tokens"
    )
    init_from: Place | None = Field(
        None, description="an adapter in PEFT's format to continue from (folder or Hub id); null: a new one"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = dict.fromkeys([*LORA_TARGETS, *(name for both in target_aliases().items() for name in both)])
        judged = set(FAMILIES.values()) <= {type(preset) for preset in PRESETS.values()}  # another's names are in its files alone
        for key in ("targets", "share"):
            for name in getattr(self, key) or ():
                if judged and name not in known:
                    raise ValueError(f"{key}: {name!r} matches nothing: {nearest(name, known)}")
        _ = self.lora  # checks itself
        return self

    @property
    def lora(self) -> LoRAConfig:
        return LoRAConfig(self.rank, self.alpha, self.dropout, self.targets, self.share, self.token_rows or ())
