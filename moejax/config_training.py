"""The sections `training` and `placement`: how weights are trained, and where frozen ones lie. No jax here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from moejax.config_values import Positive, Real, Section, as_tuple

LOGITS = 1 << 26
"""Logits of a chunk of the loss, at most: in fp32, and in the compute dtype for their gradient."""


class TrainingConfig(Section):
    """Optimizer, schedule, precision. `steps` wins over `epochs`."""

    epochs: Positive | None = None
    steps: Positive | None = None
    gradient_accumulation: Positive = Field(1, description="micro-batches per optimizer step, one global token mean")
    accumulation: Literal["micro_batch_major", "layer_major", "auto"] = Field(
        "micro_batch_major", description="layer_major: all micro-batches pass a layer together; auto: where that dequantizes less and fits"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "lion"] = Field(
        "adamw", description="adamw_8bit: as bitsandbytes', 2 bytes of moments a weight, not 8; lion: 4; adafactor: hardly any; other steps"
    )
    moments_dtype: Literal["bfloat16"] | None = Field(
        None, description="of adamw and lion; null: as the weights'; bfloat16: rounded stochastically"
    )
    learning_rate: Annotated[Real, Field(gt=0)] = 5e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_learning_rate_ratio: Annotated[Real, Field(ge=0, le=1)] = 0.0
    betas: Annotated[tuple[Real, Real], BeforeValidator(as_tuple)] = (0.9, 0.999)
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    weight_decay_on: Literal["matrices", "all"] = Field("matrices", description="all: norms, biases, Mamba's A_log and D too")
    clip_norm: Annotated[Real, Field(gt=0)] | None = 1.0
    label_smoothing: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16", "bfloat16_stochastic"] = Field(
        "float32", description="of trained weights and moments; bfloat16_stochastic: what is too small for bf16 is kept on average"
    )
    remat: Literal["none", "dots", "full", "offload", "auto"] = Field("full", description="auto: the cheapest that the compiler says fits")
    loss_chunk_tokens: Positive | None = Field(
        None, description="tokens whose logits are in memory at a time; null: 1024, fewer of a vocabulary beyond 65536"
    )
    eval_every: Positive | None = None
    on_bad_step: Literal["stop", "skip"] = Field(
        "stop", description="at a loss or gradient that is not finite; skip: that step changes nothing, ten in a row stop the run"
    )

    @property
    def together(self) -> int:
        """Micro-batches that pass a layer at once. `auto` counts as one until a run has settled it."""
        return self.gradient_accumulation if self.accumulation == "layer_major" else 1

    def loss_chunk(self, vocabulary: int) -> int:
        """Tokens whose logits are in memory at a time: as many as `LOGITS` numbers hold, a power of two, where nothing is set."""
        return self.loss_chunk_tokens or min(1024, 1 << max(1, LOGITS // vocabulary).bit_length() - 1)

    @property
    def stored_dtype(self) -> str:
        """In which trained weights are stored."""
        return self.param_dtype.removesuffix("_stochastic")

    @property
    def rounds_stochastically(self) -> bool:
        """Whether what is stored in bf16, weights or moments, is computed in fp32 and rounded so."""
        return self.param_dtype == "bfloat16_stochastic" or self.moments_dtype is not None

    @property
    def asks_bf16(self) -> bool:
        return "bfloat16" in (self.compute_dtype, self.stored_dtype)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs is None and self.steps is None:
            raise ValueError("set training.epochs or training.steps")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} leaves nothing of steps = {self.steps}")
        if self.optimizer == "adamw_8bit" and self.param_dtype == "bfloat16_stochastic":
            raise ValueError(
                "optimizer = adamw_8bit with param_dtype = bfloat16_stochastic would hold all weights and gradients in fp32 besides: "
                "expected bfloat16 or float32, or adamw or adafactor"
            )
        if self.moments_dtype is not None:
            if self.optimizer not in ("adamw", "lion"):
                raise ValueError(f"moments_dtype = {self.moments_dtype} is of adamw and lion, not of {self.optimizer}: leave it out")
            if self.stored_dtype != "float32":
                raise ValueError(f"moments_dtype: with param_dtype = {self.param_dtype} the moments are in bf16 already: leave it out")
        return self


class PlacementConfig(Section):
    """Where frozen weights lie. host: in its pinned memory, from where they come to the device as they are used.

    experts: their matrices (in 4 bits: codes and block scales). tables: embedding and head.
    """

    experts: Literal["device", "host", "auto"] | Annotated[int, Field(ge=0)] = Field(
        default="device",
        description="a number: of layers whose experts are on the device, the first ones; auto: as many layers' as fit there",
    )
    tables: Literal["device", "host"] = "device"
    prefetch: Literal["layer", "experts", "auto"] = Field(
        default="auto",
        description="experts come by the layer, or one by one ahead of their products; auto: as model.moe_backend multiplies them",
    )

    @field_validator("experts", mode="before")
    @classmethod
    def _one_of_both(cls, value: Any) -> Any:
        """One message for both kinds of value, not one a kind."""
        if value in ("device", "host", "auto") or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        raise ValueError(f"{value!r}: expected device, host, auto, or the number of layers whose experts are on the device")

    @property
    def uses_host(self) -> bool:
        return self.fetches or self.tables == "host"

    @property
    def fetches(self) -> bool:
        """Whether experts come from the host's memory. `auto` counts as the device until a run has settled it."""
        return self.experts not in ("device", "auto")

    def check(self, layers: int) -> None:
        """Raises ValueError where more layers are named than have experts."""
        if isinstance(self.experts, int) and self.experts > layers:
            raise ValueError(
                f"placement.experts = {self.experts}: layers with experts: {layers}; expected a number from 0 (host) "
                f"to {layers} (device), or auto"
            )

    def on_device(self, layers: int) -> int:
        """Of this many layers with experts, those whose lie on the device."""
        return self.experts if isinstance(self.experts, int) else 0 if self.experts == "host" else layers
