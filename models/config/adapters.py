"""How a model is stored and adapted: 4-bit storage, LoRA. No jax here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moejax.models.config.specs import Architecture, Matrix

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3")
QUANTIZED_MODULES = ("attention", "experts", "router", "mlp")


@dataclass(frozen=True)
class Quantization:
    """4-bit storage of frozen weights. `double`: block scales in 8 bits too. `modules`: which of attention, experts, router, mlp (shared
    experts and dense layers); None: those that the family has by default."""

    double: bool = True
    modules: tuple[str, ...] | None = None

    @property
    def kind(self) -> str:
        """One of `moejax.models.ops.quantized.KINDS`."""
        return "nf4-double" if self.double else "nf4"

    def __post_init__(self) -> None:
        unknown = [m for m in self.modules or () if m not in QUANTIZED_MODULES]
        if unknown:
            raise ValueError(f"quantization modules {unknown}: expected some of {list(QUANTIZED_MODULES)}")


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA as PEFT 0.18 on transformers 4 means it: one pair (A, B) per linear layer, per expert; delta = alpha/rank · B A.

    `rank`, `alpha`: one for all, or by target or group (attention, experts, router, mlp). `targets`: by our names or the family's, `gate`
    is the router; None: the family's default. `share`: targets that read one input and have one A for all of them (of each expert), as
    PEFT from 0.19 on trains fused experts; None: each its own. Dropout acts on the input of A. `token_rows`: ids of tokens whose rows of
    embedding and head are trained too, increasing.
    """

    rank: int | Mapping[str, int] = 16
    alpha: float | Mapping[str, float] = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    share: tuple[str, ...] | None = None
    token_rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, several in (("rank", self.rank), ("alpha", self.alpha)):
            for key, value in several.items() if isinstance(several, Mapping) else [("", several)]:
                if not (value >= 1 if name == "rank" else value > 0):
                    expected = "at least 1" if name == "rank" else "a number above 0"
                    raise ValueError(f"LoRA {name}{key and f' of {key}'} = {value}: expected {expected}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout = {self.dropout}: expected 0 <= dropout < 1")
        if self.targets is not None and not self.targets:
            raise ValueError("LoRA targets [] match nothing: name some, or leave them out for the family's own")
        if self.token_rows != tuple(sorted({id_ for id_ in self.token_rows if id_ >= 0})):
            raise ValueError(f"LoRA token_rows {list(self.token_rows)}: expected ids of tokens, increasing")

    def of(self, sizes: Architecture) -> dict[str, Pair]:
        """Target, by our name -> its pair.

        Raises ValueError for targets as `Architecture.resolve_targets` does, for one that has no rank or alpha, for a rank or alpha of
        what is not adapted, for targets that cannot share an A, and for rows that the vocabulary does not have.
        """
        targets = sizes.resolve_targets(self.targets)
        if self.token_rows and self.token_rows[-1] >= sizes.vocab_size:
            raise ValueError(f"LoRA token_rows has {self.token_rows[-1]}: the model's vocabulary has {sizes.vocab_size} rows")
        group_of = {path: group for group, paths in sizes.groups.items() for path in paths}
        names = {t: (t, sizes.target_names.get(t, t), group_of.get(sizes.targets[t][0], t)) for t in targets}
        ranks, alphas = (_by_target(what, given, names) for what, given in (("rank", self.rank), ("alpha", self.alpha)))
        pairs = {target: Pair(int(ranks[target]), alphas[target]) for target in targets}
        if pairs.get("w1") != pairs.get("w3") and any(block.transposed for block in sizes.names.blocks):
            raise ValueError(
                f"LoRA of a {sizes.title}: its files hold gate_proj and up_proj as one matrix, and so do its adapters: expected both among "
                "the targets, with one rank and alpha, or neither"
            )
        if self.share is None:
            return pairs
        first, *others = sizes.resolve_share(self.share)
        for target in (first, *others):
            name = names[target][1] if target in pairs else sizes.target_names.get(target, target)
            if target not in pairs:
                raise ValueError(f"LoRA share has {name}, which is not adapted: add it to targets, or leave share out")
            if pairs[target] != pairs[first]:
                raise ValueError(
                    f"LoRA share [{', '.join(self.share)}]: one A has one rank, and one alpha as PEFT has it: expected those of "
                    f"{names[first][1]} (rank {pairs[first].rank}, alpha {pairs[first].alpha:g}) for {name} (rank {pairs[target].rank}, "
                    f"alpha {pairs[target].alpha:g})"
                )
        return pairs | {target: replace(pairs[target], shares=first) for target in others}


@dataclass(frozen=True)
class Pair:
    """Of one target. delta = alpha/rank · B A. shares: the target whose A it takes; None: it has its own."""

    rank: int
    alpha: float
    shares: str | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def weights(self, matrix: Matrix) -> int:
        """Numbers of its own A and B on one copy of a matrix."""
        return self.rank * (matrix.out + (matrix.inner if self.shares is None else 0))


def _by_target(what: str, given: float | Mapping[str, float], names: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """A target's own value, or else its group's; names: of each target, those that it goes by."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    known = {name for several in names.values() for name in several}
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"LoRA {what} of {unknown[0]!r}: nothing of that name is adapted, expected some of {', '.join(sorted(known))}")
    keys = {}
    for target, several in names.items():
        key = next((name for name in several if name in given), None)
        if key is None:
            raise ValueError(f"LoRA {what} has none for {several[1]}: add {several[1]}, or its group {several[2]}")
        keys[target] = key
    unused = [key for key in given if key not in keys.values()]
    if unused:
        others = sorted({key for target, key in keys.items() if unused[0] in names[target]})
        raise ValueError(f"LoRA {what} of {unused[0]} has no target that {', '.join(others)} does not say: leave one of them out")
    return {target: given[key] for target, key in keys.items()}
