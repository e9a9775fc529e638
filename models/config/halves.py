"""The halves of a block: mixers (attention, latent attention, Mamba) and feed-forwards (experts, one MLP), and the linear layers of each.
No jax here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from moejax.models.config.rope import Rope, mscale

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weights [out, in]; copies: how many side by side [copies, out, in] (experts'); met: how many a token meets; bias: it
    has one, [out], for each copy."""

    out: int
    inner: int
    copies: int | None = None
    met: int = 1
    bias: bool = False

    @property
    def shape(self) -> Shape:
        return (self.out, self.inner) if self.copies is None else (self.copies, self.out, self.inner)


@dataclass(frozen=True)
class GQA:
    """Grouped-query attention with rotary positions. qk_norm: an RMSNorm of q and k, of each head by itself or of all heads together; bias:
    of all four projections; sinks: one more logit a head, whose weight goes nowhere; window: this many positions, its own among them, are
    seen in the blocks that the stack says (`Stack.windowed`)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    qk_norm: Literal["head", "all"] | None = None
    bias: bool = False
    sinks: bool = False
    window: int | None = None
    module: ClassVar[str] = "attention"
    scopes: ClassVar[tuple[str, ...]] = ("dequant", "norm", "lora")
    positional: ClassVar[bool] = True
    targets: ClassVar[Mapping[str, str]] = {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj")}
    buffers: ClassVar[Mapping[str, Shape]] = {}

    def matrices(self, width: int) -> dict[str, Matrix]:
        """Its linear layers, where the stream has `width` numbers a token."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {"q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, q)}
        return {name: Matrix(*shape, bias=self.bias) for name, shape in shapes.items()}

    @property
    def others(self) -> dict[str, Shape]:
        """Its other variables, none of which meets the stream."""
        sizes = {None: (), "head": (1, 1), "all": (self.heads, self.kv_heads)}[self.qk_norm]
        norms: dict[str, Shape] = {f"{name}.weight": (n * self.head_dim,) for name, n in zip(("q_norm", "k_norm"), sizes, strict=False)}
        return norms | {"sinks": (self.heads,)} if self.sinks else norms


@dataclass(frozen=True)
class MLA:
    """Latent attention (arXiv 2405.04434): keys and values of all heads are made from one latent of kv_rank numbers, queries from one of
    q_rank where there is one. A head of q and k has plain_dim numbers, and rotary_dim that turn with the position, of k the same for all
    heads. interleaved: neighbours turn against each other, and not the two halves."""

    heads: int
    q_rank: int | None
    kv_rank: int
    plain_dim: int
    rotary_dim: int
    v_dim: int
    rope: Rope
    interleaved: bool = True
    latent_eps: ClassVar[float] = 1e-6
    """Of the norms of the latents, whatever the model's own is: transformers' models/deepseek_v2/modeling_deepseek_v2.py."""
    module: ClassVar[str] = "attention"
    scopes: ClassVar[tuple[str, ...]] = GQA.scopes
    positional: ClassVar[bool] = True
    buffers: ClassVar[Mapping[str, Shape]] = {}

    @property
    def head_dim(self) -> int:
        """Numbers of a head of q and k."""
        return self.plain_dim + self.rotary_dim

    @property
    def score_scale(self) -> float:
        """Of the scores, beyond the root of a head's numbers: DeepSeek's second part of YaRN's factor."""
        yarn = self.rope.scaling
        return 1.0 if yarn is None else mscale(yarn.factor, yarn.mscale_all_dim or 0.0) ** 2

    @property
    def targets(self) -> dict[str, str]:
        queries = ("q_proj",) if self.q_rank is None else ("q_a_proj", "q_b_proj")
        return {name: name for name in (*queries, "kv_a_proj", "kv_b_proj", "o_proj")}

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        return {"attention": tuple(self.targets)}

    def matrices(self, width: int) -> dict[str, Matrix]:
        q, rank = self.heads * self.head_dim, self.q_rank
        queries = {"q_proj": Matrix(q, width)} if rank is None else {"q_a_proj": Matrix(rank, width), "q_b_proj": Matrix(q, rank)}
        return queries | {
            "kv_a_proj": Matrix(self.kv_rank + self.rotary_dim, width),
            "kv_b_proj": Matrix(self.heads * (self.plain_dim + self.v_dim), self.kv_rank),
            "o_proj": Matrix(width, self.heads * self.v_dim),
        }

    @property
    def others(self) -> dict[str, Shape]:
        ranks = {"q_a_norm.weight": self.q_rank, "kv_a_norm.weight": self.kv_rank}
        return {name: (rank,) for name, rank in ranks.items() if rank is not None}


@dataclass(frozen=True)
class Mamba:
    """A gated selective scan (arXiv 2312.00752). inner: channels; state: numbers of each; conv: taps; rank: what dt is made from."""

    inner: int
    state: int
    conv: int
    rank: int
    module: ClassVar[str] = "mamba"
    scopes: ClassVar[tuple[str, ...]] = ("conv", "scan", "dequant", "lora")
    positional: ClassVar[bool] = False
    targets: ClassVar[Mapping[str, str]] = {}
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    buffers: ClassVar[Mapping[str, Shape]] = {}

    def matrices(self, width: int) -> dict[str, Matrix]:
        into, out = Matrix(2 * self.inner, width), Matrix(width, self.inner)
        x = Matrix(self.rank + 2 * self.state, self.inner)
        return {"in_proj": into, "x_proj": x, "dt_proj": Matrix(self.inner, self.rank), "out_proj": out}

    @property
    def others(self) -> dict[str, Shape]:
        one = (self.inner,)
        taps, states = (self.inner, self.conv), (self.inner, self.state)
        return {"conv.weight": taps, "conv.bias": one, "dt_bias": one, "a_log": states, "d": one}


@dataclass(frozen=True)
class Router:
    """How a token's experts are chosen and weighted. renormalize: the weights of the chosen ones sum to one; scale: of the weights.
    choice_bias: experts are chosen by score and a bias that is never trained, and weighted by the score alone."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    bias: bool = False
    choice_bias: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class MLP:
    """w2(silu(w1 x) · w3 x), which every token meets. hidden: rows of w1 and w3."""

    hidden: int
    module: ClassVar[str] = "mlp"
    scopes: ClassVar[tuple[str, ...]] = ("dequant", "lora")
    targets: ClassVar[Mapping[str, str]] = {"dense_w1": "w1", "dense_w2": "w2", "dense_w3": "w3"}
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {"mlp": ("w1", "w2", "w3")}
    one_input: ClassVar[tuple[str, ...]] = ()
    buffers: ClassVar[Mapping[str, Shape]] = {}
    experts: ClassVar[int] = 0

    def matrices(self, width: int) -> dict[str, Matrix]:
        return {"w1": Matrix(self.hidden, width), "w2": Matrix(width, self.hidden), "w3": Matrix(self.hidden, width)}

    @property
    def others(self) -> dict[str, Shape]:
        return {}


@dataclass(frozen=True)
class ClampedSwiGLU:
    """gpt-oss's gate: g · sigmoid(alpha g) · (u + 1), with g = w1 x up to `limit` and u = w3 x between -limit and limit."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class MoE:
    """A router over gated experts: w2(act(w1 x) · w3 x). hidden: rows of w1 and w3; bias: each of the three has one for every expert.
    Every token visits all experts where that many are asked for: the dense model. shared: of an `MLP` whose output is added. one_input:
    adapter targets of an expert that read the same rows, in the order of the products."""

    experts: int
    experts_per_token: int
    hidden: int
    activation: Literal["silu", "gelu"] | ClampedSwiGLU
    router: Router
    bias: bool = False
    shared: MLP | None = None
    module: ClassVar[str] = "moe"
    scopes: ClassVar[tuple[str, ...]] = (
        "router", "router_dequant", "topk", "dispatch", "w1", "w1_dequant", "w3", "w3_dequant", "act", "w2", "w2_dequant",
        "combine", "lora", "shared", "shared_dequant",
    )  # fmt: skip
    one_input: ClassVar[tuple[str, ...]] = ("w1", "w3")

    @property
    def targets(self) -> dict[str, str]:
        shared = () if self.shared is None else self.shared.targets.values()
        return {"gate": "router", "w1": "w1", "w2": "w2", "w3": "w3"} | {f"shared_{name}": f"shared.{name}" for name in shared}

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        own = {"experts": ("w1", "w2", "w3"), "router": ("router",)}
        return own if self.shared is None else own | {"mlp": ("shared.w1", "shared.w2", "shared.w3")}

    @property
    def dense(self) -> bool:
        """Whether every token visits every expert."""
        return self.experts_per_token == self.experts

    def matrices(self, width: int) -> dict[str, Matrix]:
        into = Matrix(self.hidden, width, self.experts, self.experts_per_token, self.bias)
        out = Matrix(width, self.hidden, self.experts, self.experts_per_token, self.bias)
        own = {"router": Matrix(self.experts, width), "w1": into, "w2": out, "w3": into}
        shared = {} if self.shared is None else self.shared.matrices(width)
        return own | {f"shared.{name}": matrix for name, matrix in shared.items()}

    @property
    def others(self) -> dict[str, Shape]:
        return {"router.bias": (self.experts,)} if self.router.bias else {}

    @property
    def buffers(self) -> dict[str, Shape]:
        """fp32, never trained, and no parameters as transformers counts them."""
        return {"router.choice_bias": (self.experts,)} if self.router.choice_bias else {}


Mixer = GQA | MLA | Mamba
FeedForward = MoE | MLP
HALVES: tuple[type[Mixer | FeedForward], ...] = (GQA, MLA, Mamba, MoE, MLP)
"""Every kind; `module` is its attribute and its scope, `scopes` what is distinguished inside it."""
