"""BlackMamba (arXiv 2402.01771): Mamba and experts in turn; no attention, no positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from moejax.models import foreign_settings as foreign
from moejax.models.config.specs import Architecture, Block, Mamba, MoE, Router, Stack, Stream
from moejax.models.config.tensor_names import BlockNames, TensorNames


@dataclass(frozen=True)
class BlackMambaConfig(Architecture):
    """Defaults: BlackMamba-2.8B. `num_layers`: Mamba and MoE layers together, two of which are a block here.

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
    max_position_embeddings: int = field(default=2**31 - 1, init=False, repr=False)  # nothing in it knows a position
    tie_word_embeddings: bool = field(default=True, init=False, repr=False)
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 0
    state_size: int = 16
    conv_size: int = 4
    expansion: int = 2
    dt_rank: int | None = None
    activation: Literal["gelu", "silu"] = "gelu"
    norm_eps: float = 1e-5

    model_type: ClassVar[str] = "blackmamba"
    title: ClassVar[str] = "BlackMamba"
    default_targets: ClassVar[tuple[str, ...]] = ("w1", "w2", "w3", "gate")
    default_quantized: ClassVar[tuple[str, ...]] = ("attention", "experts", "router")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers % 2:
            raise ValueError(f"num_layers = {self.num_layers} is odd: Mamba and MoE layers come in pairs")
        if self.activation not in ("gelu", "silu"):
            raise ValueError(f"activation = {self.activation!r}: expected 'gelu' or 'silu'")

    @property
    def inner_size(self) -> int:
        """Channels D of the Mamba layers."""
        return self.expansion * self.hidden_size

    @property
    def rank(self) -> int:
        """Width R that dt is made from."""
        return -(-self.hidden_size // 16) if self.dt_rank is None else self.dt_rank

    @property
    def stacks(self) -> tuple[Stack, ...]:
        mamba = Mamba(self.inner_size, self.state_size, self.conv_size, self.rank)
        router = Router("sigmoid", renormalize=False, bias=True)
        experts = MoE(self.num_experts, self.experts_per_token, self.intermediate_size, self.activation, router)
        return (Stack(Block(mamba, experts), self.num_layers // 2),)

    @property
    def stream(self) -> Stream:
        return Stream(self.norm_eps, final_norm="layer", fp32=True)

    @property
    def names(self) -> TensorNames:
        mixer, experts = "decoder.layers.{0}.mixer", "decoder.layers.{1}.mixer"
        final = "decoder.final_layernorm"
        weights = {"decoder.layers.{0}.norm.weight": "mamba_norm.weight"}
        weights |= {f"{mixer}.{name}": f"mamba.{ours}" for name, ours in _MAMBA.items()}
        weights |= {"decoder.layers.{1}.norm.weight": "moe_norm.weight"}
        weights |= {f"{experts}.router.{part}": f"moe.router.{part}" for part in ("weight", "bias")}
        matrices: dict[str, str | tuple[str, str]] = {
            f"{experts}.local_experts.{{e}}.linear_fc1.weight": ("moe.w1.weight", "moe.w3.weight"),
            f"{experts}.local_experts.{{e}}.linear_fc2.weight": "moe.w2.weight",
        }
        after = {f"{final}.{part}": f"norm.{part}" for part in ("weight", "bias")}
        block = BlockNames(weights, matrices, layers=2)
        return TensorNames({"embedding.word_embeddings.weight": "embed.weight"}, (block,), after, ("output_layer.weight",))

    @classmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        return "mamba_moe_layers" in config  # the released files name no type

    @classmethod
    def from_hub(cls, config: Mapping[str, Any], ignored: Collection[str] = ()) -> Self:
        """The released code reads eleven keys; `bias`, `rms_norm` and `activation_func` of the file have no effect there, and none here."""
        layers = config["mamba_moe_layers"]
        if not isinstance(layers, list):
            raise ValueError(f"mamba_moe_layers = {layers!r}: expected a list of 'r' (Mamba) and numbers of experts in turn")
        for index, kind in enumerate(layers):
            if (kind == "r") != (index % 2 == 0) or (kind != "r" and not str(kind).isdecimal()):
                raise ValueError(
                    f"mamba_moe_layers[{index}] = {kind!r}: expected 'r' (Mamba) and a number of experts in turn, beginning with 'r'"
                )
        counts = sorted({int(str(kind)) for kind in layers[1::2]})
        if len(counts) != 1:
            raise ValueError(f"mamba_moe_layers has layers of {counts} experts: expected one number for all")
        if len(layers) != config["num_layers"]:
            raise ValueError(f"mamba_moe_layers has {len(layers)} entries, num_layers = {config['num_layers']}: expected the same")
        rank = -(-foreign.whole_number(config, "hidden_size") // 16)
        foreign.check(config, _KNOWN | {"dt_rank": ("auto", rank)}, ignored)
        sizes: dict[str, Any] = {field: foreign.whole_number(config, name, usual) for name, (field, usual) in _SIZES.items()}
        return cls(**sizes, num_experts=counts[0], activation=config.get("activation", "gelu"))

    def to_hub_config(self) -> dict[str, Any]:
        """That of the released checkpoints, with the study's `topk` and our `activation`."""
        return {
            "model_type": self.model_type,
            **{name: getattr(self, field) for name, (field, _) in _SIZES.items()},
            "mamba_moe_layers": ["r", str(self.num_experts)] * (self.num_layers // 2),
            "add_bias_linear": False,
            "swiglu": True,
            "activation": self.activation,
        }

    @classmethod
    def presets(cls) -> dict[str, Self]:
        tiny = cls(
            vocab_size=512, hidden_size=128, intermediate_size=144, num_layers=8, experts_per_token=2, bos_token_id=1, eos_token_id=2
        )
        small = cls(hidden_size=1152, intermediate_size=3072, num_layers=30)
        return {"blackmamba-2.8b": cls(), "blackmamba-1.5b": small, "blackmamba-tiny": tiny}


_SIZES: dict[str, tuple[str, int | None]] = {
    "vocab_size": ("vocab_size", None), "hidden_size": ("hidden_size", None), "ffn_hidden_size": ("intermediate_size", None),
    "num_layers": ("num_layers", None), "state_size": ("state_size", 16), "conv_dimension": ("conv_size", 4),
    "expansion_factor": ("expansion", 2), "topk": ("experts_per_token", 1),
}  # fmt: skip
"""config.json's name -> the field, and what the released code takes where it is left out."""

_MAMBA = {
    "A_log": "a_log", "D": "d", "in_proj.weight": "in_proj.weight", "conv1d.weight": "conv.weight", "conv1d.bias": "conv.bias",
    "x_proj.weight": "x_proj.weight", "dt_proj.weight": "dt_proj.weight", "dt_proj.bias": "dt_bias", "out_proj.weight": "out_proj.weight",
}  # fmt: skip

_KNOWN: dict[str, Any] = foreign.HARMLESS | dict.fromkeys(
    (
        # What the released code reads, with the study's `topk` and our `activation` …
        *_SIZES, "mamba_moe_layers", "activation",
        # … and what has no effect there.
        "activation_func", "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "base_model_type", "bias",
        "bias_dropout_fusion", "bias_gelu_fusion", "device", "dt_init", "dt_init_floor", "dt_max", "dt_min", "dt_scale",
        "fp32_residual_connection", "fused_add_norm", "gated_linear_unit", "init_method", "init_method_std",
        "max_position_embeddings", "num_moe_experts", "output_layer_init_method", "padded_vocab_size", "params_dtype",
        "perform_initialization", "persist_layer_norm", "rms_norm", "seq_length", "tie_word_embeddings", "use_cpu_initialization",
        "use_fast_path",
    ),
    foreign.ANY,
) | {
    "add_bias_linear": (False,), "swiglu": (True,), "conv_bias": (True,), "dt_rank": ("auto",), "hidden_dropout": (0,),
    "layernorm_epsilon": (1e-5,), "layernorm_zero_centered_gamma": (False,), "residual_in_fp32": (True,), "routing_mode": ("sinkhorn",),
}  # fmt: skip
