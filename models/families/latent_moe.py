"""What families of latent attention have in common: DeepSeek's, and those that are built like them.

The first layers have a plain feed-forward in the experts' place: a stack of their own. Every other layer adds a shared expert.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moejax.models import foreign_settings as foreign
from moejax.models.config.rope import Rope
from moejax.models.config.specs import MLA, MLP, Block, MoE, Router, Stack
from moejax.models.config.tensor_names import BlockNames, TensorNames
from moejax.models.families.attention_moe import AttentionMoEConfig

OWN = {
    "moe_intermediate_size": "intermediate_size", "intermediate_size": "dense_size", "qk_rope_head_dim": "head_dim",
    "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_nope_head_dim", "v_head_dim": "v_head_dim",
    "n_shared_experts": "shared_experts",
}  # fmt: skip
"""config.json's name of a size -> the field."""
KNOWN: dict[str, Any] = dict.fromkeys((*OWN, "q_lora_rank", "first_k_dense_replace", "n_routed_experts", "routed_scaling_factor")) | {
    # One group is none.
    "n_group": (1,), "topk_group": (1,), "moe_layer_freq": (1,), "norm_topk_prob": (False, True),
    # What changes nothing that is computed: where remote code lies, how the model was trained, what is derived, layers beyond the last.
    "auto_map": foreign.ANY, "aux_loss_alpha": foreign.ANY, "seq_aux": foreign.ANY, "ep_size": foreign.ANY, "qk_head_dim": foreign.ANY,
    "num_nextn_predict_layers": foreign.ANY, "num_mtp_layers": foreign.ANY,
}  # fmt: skip


@dataclass(frozen=True)
class LatentMoEConfig(AttentionMoEConfig, ABC):
    """head_dim: the part of a head of q and k that turns with the position, as transformers calls it there. intermediate_size: of an
    expert; shared_experts: how many such are one that every token meets. dense_layers: how many come first, of dense_size.
    predicting_layers: those behind the last one that a checkpoint may have for predicting further tokens; they are not read."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    shared_experts: int
    dense_layers: int
    dense_size: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    predicting_layers: int = dataclasses.field(default=0, kw_only=True, repr=False, compare=False)

    scores: ClassVar[Literal["softmax", "sigmoid"]]
    """The router's; sigmoids have a bias for the choice."""
    counted: ClassVar[tuple[str, ...]] = ("n_routed_experts", "num_local_experts", "num_experts")
    default_quantized: ClassVar[tuple[str, ...]] = ("attention", "experts", "mlp")
    may_be_zero: ClassVar[tuple[str, ...]] = ("new_rows", "dense_layers", "predicting_layers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_kv_heads != self.num_heads:
            raise ValueError(f"num_kv_heads = {self.num_kv_heads}: expected num_heads = {self.num_heads}, latent attention has no groups")
        if self.dense_layers >= self.num_layers:
            raise ValueError(f"dense_layers = {self.dense_layers}: expected less than num_layers = {self.num_layers}: others have experts")
        if not 0 < self.routed_scaling_factor < math.inf:
            raise ValueError(f"routed_scaling_factor = {self.routed_scaling_factor}: expected a number above 0")

    @property
    def renormalizes(self) -> bool:
        return self.norm_topk_prob

    @property
    def interleaved(self) -> bool:
        """Whether neighbours of the turning part of a head are a pair, and not its halves."""
        return True

    @property
    def stacks(self) -> tuple[Stack, ...]:
        rope = Rope(self.rope_theta, self.rope_scaling)
        sizes = self.num_heads, self.q_lora_rank, self.kv_lora_rank, self.qk_nope_head_dim, self.head_dim, self.v_head_dim
        attention = MLA(*sizes, rope, self.interleaved)
        router = Router(self.scores, self.renormalizes, choice_bias=self.scores == "sigmoid", scale=self.routed_scaling_factor)
        shared = MLP(self.shared_experts * self.intermediate_size)
        experts = MoE(self.num_experts, self.experts_per_token, self.intermediate_size, "silu", router, shared=shared)
        first = Stack(Block(attention, MLP(self.dense_size)), self.dense_layers, "first")
        return (*([first] if self.dense_layers else []), Stack(Block(attention, experts), self.num_layers - self.dense_layers))

    @property
    def names(self) -> TensorNames:
        names = super().names
        (block,) = names.blocks
        layer, mlp = "model.layers.{0}", dict(zip(self.matrices, ("w1", "w2", "w3"), strict=True))
        theirs = {"kv_a_proj": "kv_a_proj_with_mqa", "q_a_norm": "q_a_layernorm", "kv_a_norm": "kv_a_layernorm"}
        mixer = self.stacks[0].block.mixer
        parts = [*mixer.matrices(self.hidden_size), *(name.removesuffix(".weight") for name in mixer.others)]
        attention = {f"{layer}.self_attn.{theirs.get(name, name)}.weight": f"attention.{name}.weight" for name in parts}
        norm = {name: variable for name, variable in block.weights.items() if variable == "attention_norm.weight"}
        dense = norm | {f"{layer}.post_attention_layernorm.weight": "mlp_norm.weight"} | attention
        dense |= {f"{layer}.mlp.{name}.weight": f"mlp.{ours}.weight" for name, ours in mlp.items()}
        moe = {name: variable for name, variable in block.weights.items() if ".self_attn." not in name} | attention
        if self.scores == "sigmoid":
            moe[f"{layer}.mlp.gate.e_score_correction_bias"] = "moe.router.choice_bias"
        moe |= {f"{layer}.mlp.shared_experts.{name}.weight": f"moe.shared.{ours}.weight" for name, ours in mlp.items()}
        first = [BlockNames(dense, {})] if self.dense_layers else []
        beyond = tuple(f"model.layers.{self.num_layers + i}." for i in range(self.predicting_layers))
        return dataclasses.replace(names, blocks=(*first, dataclasses.replace(block, weights=moe)), beyond=beyond)

    @classmethod
    def own_fields(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """transformers' own defaults of what is missing are other models' than these: every size has to be said."""
        layers = foreign.whole_number(config, "num_hidden_layers")
        rank, heads = config["q_lora_rank"], foreign.whole_number(config, "num_attention_heads")
        if config.get("num_key_value_heads") not in (None, heads):
            raise ValueError(f"num_key_value_heads = {config['num_key_value_heads']}: expected num_attention_heads = {heads}")
        if cls.scores == "sigmoid" and "n_group" not in config:  # DeepSeek-V3's default is 8
            raise KeyError("n_group")
        beyond = foreign.same({name: config.get(name) for name in ("num_nextn_predict_layers", "num_mtp_layers")})
        return {field: foreign.whole_number(config, name) for name, field in OWN.items()} | {
            "q_lora_rank": None if rank is None else foreign.whole_number(config, "q_lora_rank"),
            "num_kv_heads": heads,
            "dense_layers": _dense_layers(config, layers),
            "routed_scaling_factor": float(foreign.number(config, "routed_scaling_factor")),
            "norm_topk_prob": bool(config.get("norm_topk_prob", cls.scores == "sigmoid")),
            "router_aux_loss_coef": 0.0,
            "predicting_layers": foreign.whole_number({"num_nextn_predict_layers": beyond or 0}, "num_nextn_predict_layers"),
        }

    def to_hub_config(self) -> dict[str, Any]:
        written = super().to_hub_config() | {name: getattr(self, field) for name, field in OWN.items()}
        for name in ("num_local_experts", "router_aux_loss_coef"):
            del written[name]
        return written | {
            "n_routed_experts": self.num_experts, "q_lora_rank": self.q_lora_rank, "first_k_dense_replace": self.dense_layers,
            "routed_scaling_factor": self.routed_scaling_factor, "norm_topk_prob": self.norm_topk_prob, "n_group": 1, "topk_group": 1,
            "scoring_func": self.scores, "topk_method": "noaux_tc" if self.scores == "sigmoid" else "greedy", "moe_layer_freq": 1,
            "attention_bias": False,
            "num_nextn_predict_layers": 0,  # what is written has none
        }  # fmt: skip


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many come first, by their number or by every layer's kind. Raises ValueError where others are dense than the first ones."""
    kinds, said = config.get("mlp_layer_types"), config.get("first_k_dense_replace")
    if kinds is None:
        return foreign.whole_number(config, "first_k_dense_replace")
    dense = kinds.index("sparse") if isinstance(kinds, list) and "sparse" in kinds else layers
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense) or said not in (None, dense):
        raise ValueError(f"mlp_layer_types, first_k_dense_replace = {said}: expected {layers} layers, first dense ones and then sparse")
    return dense
