"""Architectures as frozen dataclasses, their presets, and how the Hub writes them. No jax here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from moejax.models import foreign_settings as foreign

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3")
QUANTIZED_MODULES = ("attention", "experts", "router")


@dataclass(frozen=True)
class MixtralConfig:
    """A Mixtral: grouped-query attention, RMSNorm, and in every layer a router over gated (SwiGLU) experts.

    `experts_per_token == num_experts` is the study's dense model: every token visits every expert, and nothing is sorted.
    Raises ValueError where the sizes contradict each other.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    num_experts: int = 8
    experts_per_token: int = 2
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    router: ClassVar[str] = "softmax"
    activation: ClassVar[str] = "silu"

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "num_experts",
            "experts_per_token",
            "max_position_embeddings",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} = {getattr(self, field)}: expected at least 1")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} exceeds num_experts = {self.num_experts}: "
                f"choose at most {self.num_experts} (that is the dense model)"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd: rotary positions turn pairs")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a number above 0")

    @property
    def dense(self) -> bool:
        """Whether every token visits every expert."""
        return self.experts_per_token == self.num_experts

    def replace(self, **changes: Any) -> MixtralConfig:
        return dataclasses.replace(self, **changes)

    def to_hub_config(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 both read."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "router_jitter_noise": 0.0,
            "sliding_window": None,
        }


@dataclass(frozen=True)
class BlackMambaConfig:
    """A BlackMamba (arXiv 2402.01771): Mamba and MoE layers in turn, `num_layers` of both together; no attention, no positions.

    The router is a linear layer with bias; a chosen expert's weight is the sigmoid itself, not renormalized. `activation`: the
    released code computes a gated GELU (erf), the paper says SiLU. `experts_per_token`: 1 as pre-trained; the study took 2 and 8.
    `dt_rank` None: hidden_size / 16, rounded up. Raises ValueError where the sizes contradict each other.
    """

    vocab_size: int = 50304
    hidden_size: int = 1472
    intermediate_size: int = 3872
    num_layers: int = 36
    num_experts: int = 8
    experts_per_token: int = 1
    state_size: int = 16
    conv_size: int = 4
    expansion: int = 2
    dt_rank: int | None = None
    activation: str = "gelu"
    norm_eps: float = 1e-5
    bos_token_id: int | None = 0
    eos_token_id: int | None = 0
    router: ClassVar[str] = "sigmoid"
    tie_word_embeddings: ClassVar[bool] = True
    max_position_embeddings: ClassVar[int] = 2**31 - 1  # nothing in it knows a position

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"{field.name} = {value}: expected at least 1")
        if self.num_layers % 2:
            raise ValueError(f"num_layers = {self.num_layers} is odd: Mamba and MoE layers come in pairs")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} exceeds num_experts = {self.num_experts}: "
                f"choose at most {self.num_experts} (that is the dense model)"
            )
        if self.activation not in ("gelu", "silu"):
            raise ValueError(f"activation = {self.activation!r}: expected 'gelu' or 'silu'")

    @property
    def dense(self) -> bool:
        """Whether every token visits every expert."""
        return self.experts_per_token == self.num_experts

    @property
    def inner_size(self) -> int:
        """Channels D of the Mamba layers."""
        return self.expansion * self.hidden_size

    @property
    def rank(self) -> int:
        """Width R that dt is made from."""
        return -(-self.hidden_size // 16) if self.dt_rank is None else self.dt_rank

    def replace(self, **changes: Any) -> BlackMambaConfig:
        return dataclasses.replace(self, **changes)

    def to_hub_config(self) -> dict[str, Any]:
        """The `config.json` of the released checkpoints, with the study's `topk` and our `activation`."""
        return {
            "model_type": "blackmamba",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.intermediate_size,
            "num_layers": self.num_layers,
            "state_size": self.state_size,
            "conv_dimension": self.conv_size,
            "expansion_factor": self.expansion,
            "mamba_moe_layers": ["r", str(self.num_experts)] * (self.num_layers // 2),
            "add_bias_linear": False,
            "swiglu": True,
            "topk": self.experts_per_token,
            "activation": self.activation,
        }


Architecture = MixtralConfig | BlackMambaConfig


@dataclass(frozen=True)
class Quantization:
    """NF4 storage of frozen weights. `double`: block scales in 8 bits too. `modules`: which of attention, experts, router."""

    double: bool = True
    modules: tuple[str, ...] = QUANTIZED_MODULES

    def __post_init__(self) -> None:
        unknown = [m for m in self.modules if m not in QUANTIZED_MODULES]
        if unknown:
            raise ValueError(f"quantization modules {unknown}: expected some of {list(QUANTIZED_MODULES)}")


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA as PEFT 0.18 on transformers 4 means it: one pair (A, B) per linear layer, per expert; delta = alpha/rank · B A.

    `targets`: names of PEFT's users; `gate` is the router. Dropout acts on the input of A.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("w1", "w2", "w3", "gate")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank = {self.rank}: expected at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout = {self.dropout}: expected 0 <= dropout < 1")
        unknown = [t for t in self.targets if t not in LORA_TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"LoRA targets {unknown or '[]'} match nothing: expected some of {list(LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


PRESETS: dict[str, Architecture] = {
    "mixtral-8x7b": MixtralConfig(),
    "mixtral-tiny": MixtralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=160,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_theta=1e4,
    ),
    "blackmamba-2.8b": BlackMambaConfig(),
    "blackmamba-1.5b": BlackMambaConfig(hidden_size=1152, intermediate_size=3072, num_layers=30),
    "blackmamba-tiny": BlackMambaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=144,
        num_layers=8,
        experts_per_token=2,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def from_hub_config(config: Mapping[str, Any], ignored: Collection[str] = ()) -> Architecture:
    """Read a Hub `config.json`: a Mixtral's, or a BlackMamba's (which names no type, but its `mamba_moe_layers`).

    ignored: keys of it that may say what they want. Raises ValueError for another architecture, and for every setting that is not known
    to be computed here (scaled rotary positions, a sliding window, a dropout of transformers' own, a key that nobody knows): such a
    model would give other numbers without saying so. Raises KeyError where a size is missing.
    """
    return _blackmamba(config, ignored) if "mamba_moe_layers" in config else _mixtral(config, ignored)


def _check_computed(config: Mapping[str, Any], known: foreign.Table, ignored: Collection[str]) -> None:
    found = list(foreign.uncomputed(config, known, ignored))
    if found:
        keys = dict.fromkeys(re.split("[ .]", text)[0] for text in found)
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise ValueError(
            f"config.json has {', '.join(found[:6])}{more}: not known to be computed here, so the model could give other numbers. "
            f"Give another model; or, if you know that this changes nothing, set model.ignored_settings=[{','.join(keys)}]"
        )


def _blackmamba(config: Mapping[str, Any], ignored: Collection[str]) -> BlackMambaConfig:
    """The released code reads eleven keys; `bias`, `rms_norm` and `activation_func` of the file have no effect there, and none here."""
    layers = config["mamba_moe_layers"]
    if not isinstance(layers, list):
        raise ValueError(f"mamba_moe_layers = {layers!r}: expected a list of 'r' (Mamba) and numbers of experts in turn")
    for index, kind in enumerate(layers):
        if (kind == "r") != (index % 2 == 0) or (kind != "r" and not str(kind).isdigit()):
            raise ValueError(
                f"mamba_moe_layers[{index}] = {kind!r}: expected 'r' (Mamba) and a number of experts in turn, beginning with 'r'"
            )
    counts = sorted({int(str(kind)[-1]) for kind in layers[1::2]})
    if len(counts) != 1:
        raise ValueError(f"mamba_moe_layers has layers of {counts} experts: expected one number for all")
    if len(layers) != config["num_layers"]:
        raise ValueError(f"mamba_moe_layers has {len(layers)} entries, num_layers = {config['num_layers']}: expected the same")
    hidden = foreign.whole_number(config, "hidden_size")
    _check_computed(config, foreign.BLACKMAMBA | {"dt_rank": ("auto", -(-hidden // 16))}, ignored)
    return BlackMambaConfig(
        vocab_size=foreign.whole_number(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=foreign.whole_number(config, "ffn_hidden_size"),
        num_layers=foreign.whole_number(config, "num_layers"),
        num_experts=counts[0],
        experts_per_token=foreign.whole_number(config, "topk", 1),
        state_size=foreign.whole_number(config, "state_size", 16),
        conv_size=foreign.whole_number(config, "conv_dimension", 4),
        expansion=foreign.whole_number(config, "expansion_factor", 2),
        activation=config.get("activation", "gelu"),
    )


def _mixtral(config: Mapping[str, Any], ignored: Collection[str]) -> MixtralConfig:
    """In the dialect of transformers 4 (`rope_theta`) or 5 (`rope_parameters`); what is missing has transformers' default."""
    model_type = config.get("model_type")
    if model_type != "mixtral":
        raise ValueError(f"config.json has model_type = {model_type!r}: expected 'mixtral'")
    layers, heads, hidden = (
        foreign.whole_number(config, name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    positions = foreign.whole_number(config, "max_position_embeddings", 131072)
    window, types = config.get("sliding_window"), config.get("layer_types")
    whole = isinstance(window, int) and window >= positions  # a window over every position is none
    known = {"sliding_window": (None, window) if whole else (None,)}
    known |= {"layer_types": (None, types) if types == ["full_attention"] * layers else (None,)}
    _check_computed(config, foreign.MIXTRAL | known, ignored)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    experts = "num_local_experts" if "num_local_experts" in config else "num_experts"
    eos = config.get("eos_token_id")
    return MixtralConfig(
        vocab_size=foreign.whole_number(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=foreign.whole_number(config, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if config.get("num_key_value_heads", 8) is None else foreign.whole_number(config, "num_key_value_heads", 8),
        head_dim=hidden // heads if config.get("head_dim") is None else foreign.whole_number(config, "head_dim"),
        num_experts=foreign.whole_number(config, experts, 8),
        experts_per_token=foreign.whole_number(config, "num_experts_per_tok", 2),
        rope_theta=float(foreign.number(rope if rope.get("rope_theta") is not None else config, "rope_theta", 1e6)),
        rms_norm_eps=foreign.number(config, "rms_norm_eps", 1e-5),
        max_position_embeddings=positions,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        router_aux_loss_coef=foreign.number(config, "router_aux_loss_coef", 0.001),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
    )
