"""gpt-oss (arXiv 2508.10925): a sink a head, a window in every other layer, biases everywhere, experts with a clamped gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from moejax.models import foreign_settings as foreign
from moejax.models.config import rope
from moejax.models.config.specs import GQA, Block, ClampedSwiGLU, MoE, Router, Stack
from moejax.models.config.tensor_names import BlockNames, TensorNames
from moejax.models.families.attention_moe import AttentionMoEConfig

YARN = rope.Yarn(32.0, 4096, truncate=False)


@dataclass(frozen=True)
class GptOssConfig(AttentionMoEConfig):
    """Defaults: gpt-oss-20b. sliding_window: of the layers that `windowed` says, or of the first, the third …; swiglu_limit, swiglu_alpha:
    of the experts' gate."""

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_layers: int = 24
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 64
    num_experts: int = 32
    experts_per_token: int = 4
    rope_theta: float = 150000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False
    router_aux_loss_coef: float = 0.9
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 200002
    sliding_window: int = 128
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    rope_scaling: rope.Yarn | None = dataclasses.field(default=YARN, kw_only=True)
    windowed: tuple[bool, ...] | None = dataclasses.field(default=None, kw_only=True, repr=False)

    model_type: ClassVar[str] = "gpt_oss"
    title: ClassVar[str] = "gpt-oss"
    architecture: ClassVar[str] = "GptOssForCausalLM"
    layer_types: ClassVar[tuple[str, ...]] = ("full_attention", "sliding_attention")
    missing: ClassVar[Mapping[str, Any]] = {"num_experts": 128, "router_aux_loss_coef": 0.001}
    known: ClassVar[Mapping[str, Any]] = {
        "intermediate_size": foreign.ANY, "sliding_window": foreign.ANY, "swiglu_limit": foreign.ANY, "swiglu_alpha": foreign.ANY,
        "experts_per_token": foreign.ANY, "initial_context_length": foreign.ANY, "attention_bias": (True,),
        "quantization_config": foreign.MXFP4,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.windowed is not None and (not isinstance(self.windowed, tuple) or len(self.windowed) != self.num_layers):
            raise ValueError(
                f"windowed = {self.windowed!r}: expected one of each of the {self.num_layers} layers; it is read from the layer_types in "
                "the config.json of model.source, and has no override"
            )

    @property
    def short(self) -> tuple[bool, ...]:
        """Which layers have the window."""
        return self.windowed or tuple(layer % 2 == 0 for layer in range(self.num_layers))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        positions = rope.Rope(self.rope_theta, self.rope_scaling)
        attention = GQA(self.num_heads, self.num_kv_heads, self.head_dim, positions, bias=True, sinks=True, window=self.sliding_window)
        gate = ClampedSwiGLU(self.swiglu_alpha, self.swiglu_limit)
        experts = MoE(self.num_experts, self.experts_per_token, self.intermediate_size, gate, Router(bias=True), bias=True)
        return (Stack(Block(attention, experts), self.num_layers, windowed=self.short),)

    @property
    def names(self) -> TensorNames:
        """Files hold the experts of a layer in one tensor; an expert's own names are those that it would have."""
        layer, names = "model.layers.{0}", super().names
        (block,) = names.blocks
        weights = {name: variable for name, variable in block.weights.items() if "mlp.gate" not in name}
        weights |= {f"{layer}.self_attn.{name}.bias": f"attention.{name}.bias" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        weights |= {f"{layer}.self_attn.sinks": "attention.sinks"}
        weights |= {f"{layer}.mlp.router.{part}": f"moe.router.{part}" for part in ("weight", "bias")}
        biases = {name.replace(".weight", ".bias"): str(ours).replace(".weight", ".bias") for name, ours in block.experts.items()}
        stacked = dict(block.stacked) | {
            f"{layer}.mlp.experts.gate_up_proj_bias": ("moe.w1.bias", "moe.w3.bias"),
            f"{layer}.mlp.experts.down_proj_bias": "moe.w2.bias",
        }
        renamed = {f"{layer}.mlp.router.weight": "moe.router.weight"}
        block = BlockNames(weights, {**block.experts, **biases}, stacked, interleaved=True, transposed=True, renamed=renamed)
        return dataclasses.replace(names, blocks=(block,))

    @classmethod
    def window(cls, config: Mapping[str, Any]) -> Any:
        return None

    @classmethod
    def own_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        foreign.same({name: config.get(name) for name in ("num_experts_per_tok", "experts_per_token")})
        limits = {name: foreign.number(config, name, getattr(cls, name)) for name in ("swiglu_limit", "swiglu_alpha")}
        window, types = foreign.whole_number(config, "sliding_window", 128), config.get("layer_types")
        windowed = tuple(kind == "sliding_attention" for kind in types) if isinstance(types, list) else ()
        usual = all(short == (layer % 2 == 0) for layer, short in enumerate(windowed))
        return super().own_fields(config) | limits | {"sliding_window": window, "windowed": None if usual else windowed}

    @classmethod
    def from_hub(cls, config: Mapping[str, Any], ignored: Collection[str] = ()) -> Self:
        """Positions are scaled where a file does not say how they are."""
        scaled = any(config.get(name) for name in ("rope_parameters", "rope_scaling"))
        return super().from_hub({"head_dim": 64, **config} | ({} if scaled else {"rope_scaling": YARN.to_hub()}), ignored)

    def to_hub_config(self) -> dict[str, Any]:
        return {"rope_scaling": {"rope_type": "default"}} | super().to_hub_config() | {
            "attention_bias": True, "sliding_window": self.sliding_window,
            "layer_types": [("full_attention", "sliding_attention")[short] for short in self.short],
            "swiglu_limit": self.swiglu_limit, "swiglu_alpha": self.swiglu_alpha,
        }  # fmt: skip

    @classmethod
    def presets(cls) -> dict[str, Self]:
        tiny = cls(
            vocab_size=512, hidden_size=128, intermediate_size=96, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, num_experts=8,
            experts_per_token=2, max_position_embeddings=2048, rope_theta=1e4, sliding_window=16, eos_token_id=2,
            rope_scaling=rope.Yarn(4.0, 512, truncate=False),
        )  # fmt: skip
        large = cls(num_layers=36, num_experts=128, expert_format="mxfp4")
        return {"gpt-oss-20b": cls(expert_format="mxfp4"), "gpt-oss-120b": large, "gpt-oss-tiny": tiny}
