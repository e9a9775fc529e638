"""What families of attention and experts have in common (Mixtral and those that followed it): sizes, config.json, tensors' names."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from moejax.models import foreign_settings as foreign
from moejax.models.config import rope
from moejax.models.config.specs import GQA, Architecture, Block, BlockNorm, MoE, Router, Stack, Stream
from moejax.models.config.tensor_names import BlockNames, TensorNames

SIZES = {
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "vocab_size": "vocab_size", "hidden_size": "hidden_size",
    "num_experts_per_tok": "experts_per_token", "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
"""config.json's name of a size -> the field; more have to be looked for."""
SAME = ("intermediate_size", "head_dim", "rope_theta", "rms_norm_eps", "router_aux_loss_coef", "tie_word_embeddings", "bos_token_id")
"""Names that are the fields' own."""
DEFAULTED = {name: name for name in ("rope_theta", "rms_norm_eps", "max_position_embeddings", "router_aux_loss_coef")} | {
    "num_key_value_heads": "num_kv_heads", "num_experts": "num_experts", "num_experts_per_tok": "experts_per_token",
}  # fmt: skip
"""What a config.json may leave out."""
KNOWN: dict[str, Any] = foreign.HARMLESS | dict.fromkeys((*SIZES, *DEFAULTED, "head_dim", "num_local_experts", "output_router_logits")) | {
    "hidden_act": ("silu", "swish"), "attention_dropout": (0,), "tie_word_embeddings": (False, True), "partial_rotary_factor": (1,),
    "pretraining_tp": (1,), "quantization_config": foreign.BITSANDBYTES,
}  # fmt: skip
"""What such a config.json may say. `sliding_window` and `layer_types` are judged by the number of positions and of layers, rotary
positions by their kind."""


@dataclass(frozen=True)
class AttentionMoEConfig(Architecture, ABC):
    """Grouped-query attention, RMSNorm, and in every layer a softmax router over gated (SwiGLU) experts."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    router_aux_loss_coef: float
    rope_scaling: rope.Yarn | None = dataclasses.field(default=None, kw_only=True, repr=False)

    architecture: ClassVar[str]
    """transformers' class."""
    module: ClassVar[str] = "mlp"
    """What checkpoints call the experts' half of a layer,"""
    matrices: ClassVar[tuple[str, str, str]] = ("gate_proj", "down_proj", "up_proj")
    """and w1, w2, w3."""
    qk_norm: ClassVar[Literal["head", "all"] | None] = None
    block_norm: ClassVar[BlockNorm] = "before"
    missing: ClassVar[Mapping[str, Any]] = {}
    """transformers' values of what a config.json leaves out, where the class has others."""
    known: ClassVar[Mapping[str, Any]] = {}
    """Keys of config.json beyond `KNOWN`."""
    layer_types: ClassVar[tuple[str, ...]] = ("full_attention",)
    """What config.json may say of a layer's attention."""
    counted: ClassVar[tuple[str, ...]] = ("num_local_experts", "num_experts")
    """What config.json calls the number of experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd: rotary positions turn pairs")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: expected a number above 0")
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError(f"router_aux_loss_coef = {self.router_aux_loss_coef}: expected 0 or a number above it")
        if not isinstance(self.rope_scaling, rope.Yarn | None):
            raise ValueError(f"rope_scaling = {self.rope_scaling!r}: it is read from the config.json of model.source, and has no override")

    @property
    def renormalizes(self) -> bool:
        """Whether the weights of a token's experts sum to one."""
        return True

    @property
    def stacks(self) -> tuple[Stack, ...]:
        attention = GQA(self.num_heads, self.num_kv_heads, self.head_dim, rope.Rope(self.rope_theta, self.rope_scaling), self.qk_norm)
        router = Router("softmax", self.renormalizes)
        experts = MoE(self.num_experts, self.experts_per_token, self.intermediate_size, "silu", router)
        return (Stack(Block(attention, experts, self.block_norm), self.num_layers),)

    @property
    def stream(self) -> Stream:
        return Stream(self.rms_norm_eps)

    @property
    def names(self) -> TensorNames:
        layer = "model.layers.{0}"
        norms = () if self.qk_norm is None else ("q_norm", "k_norm")
        first, second = {"before": ("input", "post_attention"), "after": ("post_attention", "post_feedforward")}[self.block_norm]
        weights = {f"{layer}.{first}_layernorm.weight": "attention_norm.weight", f"{layer}.{second}_layernorm.weight": "moe_norm.weight"}
        attention = ("q_proj", "k_proj", "v_proj", "o_proj", *norms)
        weights |= {f"{layer}.self_attn.{name}.weight": f"attention.{name}.weight" for name in attention}
        weights[f"{layer}.{self.module}.gate.weight"] = "moe.router.weight"
        experts = {
            f"{layer}.{self.module}.experts.{{e}}.{name}.weight": f"moe.{ours}.weight"
            for name, ours in zip(self.matrices, ("w1", "w2", "w3"), strict=True)
        }
        stacked: dict[str, str | tuple[str, str]] = {
            f"{layer}.mlp.experts.gate_up_proj": ("moe.w1.weight", "moe.w3.weight"),
            f"{layer}.mlp.experts.down_proj": "moe.w2.weight",
        }
        block = BlockNames(weights, experts, stacked, {f"{layer}.mlp.gate.weight": "moe.router.weight"})
        head = {} if self.tie_word_embeddings else {"lm_head.weight": "head.weight"}
        return TensorNames({"model.embed_tokens.weight": "embed.weight"}, (block,), {"model.norm.weight": "norm.weight"} | head)

    @classmethod
    def window(cls, config: Mapping[str, Any]) -> Any:
        """The positions that attention reaches back; None: all."""
        return config.get("sliding_window")

    @classmethod
    def own_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that a family reads in its own way."""
        return {"intermediate_size": foreign.whole_number(config, "intermediate_size")}

    @classmethod
    def from_hub(cls, config: Mapping[str, Any], ignored: Collection[str] = ()) -> Self:
        """In the dialect of transformers 4 (`rope_theta`) or 5 (`rope_parameters`); what is missing has transformers' default."""

        missing = {name: getattr(cls, field) for name, field in DEFAULTED.items()} | dict(cls.missing)

        def size(name: str) -> int:
            return foreign.whole_number(config, name, missing.get(name))

        sizes: dict[str, Any] = {field: size(name) for name, field in SIZES.items()}
        layers, heads, positions = sizes["num_layers"], sizes["num_heads"], sizes["max_position_embeddings"]
        window, types = cls.window(config), config.get("layer_types")
        whole = window is None or (isinstance(window, int) and window >= positions)  # a window over every position is none
        kinds = isinstance(types, list) and len(types) == layers and all(kind in cls.layer_types for kind in types)
        judged = {
            "sliding_window": (None, config.get("sliding_window")) if whole else (None,),
            "layer_types": (None, types) if kinds else (None,),
            **{name: rope.known(config.get(name)) for name in ("rope_parameters", "rope_scaling")},
        }
        foreign.check(config, KNOWN | dict(cls.known) | judged, ignored)
        ropes = {"": config} | {f"{name}.": config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)}
        thetas = {f"{where}rope_theta": each.get("rope_theta") for where, each in ropes.items() if isinstance(each, Mapping)}
        theta = foreign.same(thetas)
        theta = float(foreign.number(missing if theta is None else {"rope_theta": theta}, "rope_theta"))
        kv_heads = config.get("num_key_value_heads", missing["num_key_value_heads"])
        experts = foreign.same({name: config.get(name) for name in cls.counted})
        eos = config.get("eos_token_id")
        fields: dict[str, Any] = dict(
            sizes,
            rms_norm_eps=foreign.number(config, "rms_norm_eps", missing["rms_norm_eps"]),
            router_aux_loss_coef=foreign.number(config, "router_aux_loss_coef", missing["router_aux_loss_coef"]),
            num_kv_heads=heads if kv_heads is None else size("num_key_value_heads"),
            head_dim=sizes["hidden_size"] // heads if config.get("head_dim") is None else size("head_dim"),
            num_experts=foreign.whole_number(missing if experts is None else {"num_experts": experts}, "num_experts"),
            rope_theta=theta,
            rope_scaling=rope.of_hub({k: v for k, v in config.items() if k not in ignored}, positions, theta).scaling,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        )
        return cls(**(fields | cls.own_fields(config)))

    def to_hub_config(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 both read. Without a token for padding some classes take one of their own, which a
        small vocabulary does not have."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{name: getattr(self, field) for name, field in SIZES.items()},
            **{name: getattr(self, name) for name in SAME},
            "num_key_value_heads": self.num_kv_heads,
            "num_local_experts": self.num_experts,
            "pad_token_id": None,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            **({} if self.rope_scaling is None else {"rope_scaling": self.rope_scaling.to_hub()}),
        }
