"""What an architecture is: its sizes, and stacks of equal blocks, each a mixer and a feed-forward (`halves`). No jax here.

Whatever follows from an architecture (parameters, FLOPs, bytes, tensors' names, adapters' targets) is computed from these specs: only
a family's own file (`moejax.models.families`) knows which family it is. A `match` on kinds ends in `assert_never`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from moejax.models.config.halves import GQA as GQA
from moejax.models.config.halves import HALVES as HALVES
from moejax.models.config.halves import MLA as MLA
from moejax.models.config.halves import MLP as MLP
from moejax.models.config.halves import ClampedSwiGLU as ClampedSwiGLU
from moejax.models.config.halves import FeedForward as FeedForward
from moejax.models.config.halves import Mamba as Mamba
from moejax.models.config.halves import Matrix as Matrix
from moejax.models.config.halves import Mixer as Mixer
from moejax.models.config.halves import MoE as MoE
from moejax.models.config.halves import Router as Router
from moejax.models.config.halves import Shape as Shape
from moejax.models.config.tensor_names import TensorNames

EVERYWHERE = 2**30
"""A window that is none: more positions than any row has."""
Path = tuple[str, ...]
BlockNorm = Literal["before", "after"]


@dataclass(frozen=True)
class Block:
    """x += mixer(norm(x)); x += feed_forward(norm(x)). norm: before each half, or "after" it: x += norm(mixer(x)); …"""

    mixer: Mixer
    feed_forward: FeedForward
    norm: BlockNorm = "before"

    @property
    def halves(self) -> tuple[Mixer, FeedForward]:
        return self.mixer, self.feed_forward


@dataclass(frozen=True)
class Stack:
    """`repeats` equal blocks, whose weights are stacked [L, …] in the model's attribute `name`. windowed: which of them attend within their
    mixer's window; empty: none."""

    block: Block
    repeats: int
    name: str = "layers"
    windowed: tuple[bool, ...] = ()

    @property
    def windows(self) -> tuple[int, ...] | None:
        """The positions that each block's attention reaches back, or none of none: a number that the scan over them carries."""
        window = getattr(self.block.mixer, "window", None)
        return tuple(window if short else EVERYWHERE for short in self.windowed) if self.windowed and window is not None else None


@dataclass(frozen=True)
class Stream:
    """What runs through the blocks. norm_eps: of every norm; final_norm: of the one before the head; fp32: the stream itself is in fp32,
    whatever is computed in."""

    norm_eps: float
    final_norm: Literal["rms", "layer"] = "rms"
    fp32: bool = False


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"), "float": ((int, float), "a number"), "bool": ((bool,), "true or false"),
    "int | None": ((int, type(None)), "a whole number or null"),
    "int | tuple[int, ...] | None": ((int, tuple, type(None)), "a whole number, several, or null"),
}  # fmt: skip
"""A field's annotation -> what it may be."""


@dataclass(frozen=True)
class Architecture(ABC):
    """A model's sizes under the names that `model.overrides` takes, and what follows from them. Each family is a subclass.

    `experts_per_token == num_experts` is the dense model: every token visits every expert, and nothing is sorted. num_layers: as the
    checkpoint counts them. Raises ValueError where the sizes contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None
    new_rows: int = dataclasses.field(default=0, kw_only=True, repr=False)
    """Of vocab_size, the last ones, which a checkpoint may lack: tokens that were added. They begin as the mean of its own."""
    expert_format: str | None = dataclasses.field(default=None, kw_only=True)
    """How its checkpoint stores the experts, where that is in 4 bits of its own ("mxfp4"): frozen they stay so. None: as numbers."""

    model_type: ClassVar[str]
    """What config.json calls the family."""
    title: ClassVar[str]
    """What people call it."""
    default_groups: ClassVar[tuple[str, ...]] = ("attention", "experts")
    """Where adapters are if nobody says: the router as servers expect it, neither trained nor quantized."""
    default_quantized: ClassVar[tuple[str, ...]] = ("attention", "experts")
    may_be_zero: ClassVar[tuple[str, ...]] = ("new_rows",)
    """Fields of whole numbers that may be 0."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
            types, expected = _TYPES.get(kind, ((), ""))
            if types and type(value) not in types:
                raise ValueError(f"{field.name} = {value!r}: expected {expected}")
            if kind == "int" and value < (field.name not in self.may_be_zero):
                raise ValueError(f"{field.name} = {value}: expected at least {int(field.name not in self.may_be_zero)}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} exceeds num_experts = {self.num_experts}: "
                f"choose at most {self.num_experts} (that is the dense model)"
            )

    # What a family says.

    @property
    @abstractmethod
    def stacks(self) -> tuple[Stack, ...]:
        """The blocks, in order."""

    @property
    @abstractmethod
    def stream(self) -> Stream:
        """What holds for the model as a whole."""

    @property
    @abstractmethod
    def names(self) -> TensorNames:
        """How its checkpoints name their tensors."""

    @classmethod
    @abstractmethod
    def from_hub(cls, config: Mapping[str, Any], ignored: Collection[str] = ()) -> Self:
        """Read a `config.json`: see `moejax.models.config.from_hub_config`."""

    @abstractmethod
    def to_hub_config(self) -> dict[str, Any]:
        """The `config.json` that `from_hub` reads, and transformers where it has the family."""

    @classmethod
    def presets(cls) -> dict[str, Self]:
        """Well-known sizes by name, in lower case."""
        return {}

    @classmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is of this family."""
        return config.get("model_type") == cls.model_type

    # What follows.

    @property
    def dense(self) -> bool:
        """Whether every token visits every expert."""
        return self.experts_per_token == self.num_experts

    @property
    def _halves(self) -> list[tuple[Stack, Mixer | FeedForward]]:
        return [(stack, half) for stack in self.stacks for half in stack.block.halves]

    @property
    def blocks(self) -> int:
        return sum(stack.repeats for stack in self.stacks)

    @property
    def expert_layers(self) -> int:
        """Blocks that have experts."""
        return sum(stack.repeats for stack in self.stacks if stack.block.feed_forward.experts)

    @property
    def expert_layer_numbers(self) -> tuple[int, ...]:
        """Of the blocks that have experts, the numbers that its checkpoints give those layers."""
        first, found = 0, list[int]()
        for stack, names in zip(self.stacks, self.names.blocks, strict=True):
            end = first + stack.repeats * names.layers
            found += range(first + names.layers - 1, end, names.layers) if stack.block.feed_forward.experts else []
            first = end
        return tuple(found)

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """The names that `replace` takes."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.init)

    @classmethod
    def sizes(cls) -> tuple[str, ...]:
        """Those that a user may change: the others follow from files."""
        return tuple(name for name in cls.fields() if name not in ("new_rows", "expert_format"))

    @property
    def weights(self) -> dict[Path, Shape]:
        """Every variable of the model -> its shape; a stack's have an axis of its blocks before them."""
        d, norm = self.hidden_size, {"rms": ("weight",), "layer": ("weight", "bias")}[self.stream.final_norm]
        found: dict[Path, Shape] = {(*path, "weight"): (blocks, *m.shape) for path, (m, blocks) in self.linears.items()}
        found |= {(*path, "bias"): (blocks, *m.shape[:-1]) for path, (m, blocks) in self.linears.items() if m.bias}
        for stack, half in self._halves:
            others = {**half.others, **half.buffers}
            found |= {(stack.name, half.module, *name.split(".")): (stack.repeats, *shape) for name, shape in others.items()}
            found[stack.name, f"{half.module}_norm", "weight"] = (stack.repeats, d)
        for module in ("embed",) if self.tie_word_embeddings else ("embed", "head"):
            found[module, "weight"] = (self.vocab_size, d)
        return found | {("norm", part): (d,) for part in norm}

    @property
    def linears(self) -> dict[Path, tuple[Matrix, int]]:
        """The blocks' linear layers, and how many blocks have each."""
        return {
            (stack.name, half.module, *name.split(".")): (matrix, stack.repeats)
            for stack, half in self._halves
            for name, matrix in half.matrices(self.hidden_size).items()
        }

    @property
    def buffers(self) -> tuple[Path, ...]:
        """Of `weights`, those that are never trained, and always fp32."""
        return tuple((stack.name, half.module, *name.split(".")) for stack, half in self._halves for name in half.buffers)

    @property
    def parameters(self) -> tuple[int, int]:
        """All, and those that a token meets; `buffers` are none."""
        every = sum(math.prod(shape) for path, shape in self.weights.items() if path not in self.buffers)
        return every, every - sum(n * (m.copies - m.met) * m.out * (m.inner + m.bias) for m, n in self.linears.values() if m.copies)

    def kind_of(self, path: Path) -> str:
        """What a variable is counted among: a group that can be quantized, its mixer, norms, embeddings or head."""
        if len(path) < 3:
            return {"embed": "embeddings", "norm": "norms"}.get(path[0], path[0])
        group = next((name for name, modules in self.groups.items() if any(path[: len(m)] == m for m in modules)), path[1])
        return "norms" if path[1].endswith("_norm") or path[2].endswith("_norm") else group

    @property
    def targets(self) -> dict[str, tuple[Path, ...]]:
        """Adapter target, by our name -> the (stacked) modules that it is."""
        found: dict[str, tuple[Path, ...]] = {}
        for stack, half in self._halves:
            for target, module in half.targets.items():
                found[target] = (*found.get(target, ()), (stack.name, half.module, *module.split(".")))
        return found

    @property
    def groups(self) -> dict[str, tuple[Path, ...]]:
        """What `quantization.modules` may name -> the modules."""
        found: dict[str, tuple[Path, ...]] = {}
        for stack, half in self._halves:
            for group, modules in half.groups.items():
                found[group] = (*found.get(group, ()), *((stack.name, half.module, *module.split(".")) for module in modules))
        return found

    @property
    def target_names(self) -> dict[str, str]:
        """Adapter target, by our name -> what its checkpoints, and so PEFT, call the module: the last part of its name, the last two where
        an expert has one of the same name. Empty where one has no tensor of its own: then no format is known that an adapter could be
        saved in."""
        modules = {path: target for target, paths in self.targets.items() for path in paths}
        of_experts = {name.split(".")[-2] for names in self.names.blocks for name in names.experts}
        found = {}
        for stack, names in zip(self.stacks, self.names.blocks, strict=True):
            for name, variable in [*names.weights.items(), *names.experts.items()]:
                if isinstance(variable, str) and variable.endswith(".weight"):
                    target = modules.get((stack.name, *variable.split(".")[:-1]))
                    if target is not None:
                        *_, parent, own, _ = name.split(".")
                        found[target] = f"{parent}.{own}" if own in of_experts and name not in names.experts else own
        return found if found.keys() == self.targets.keys() else {}

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Where adapters are if nobody says."""
        adapted = {path for group in self.default_groups for path in self.groups.get(group, ())}
        return tuple(target for target, paths in self.targets.items() if paths[0] in adapted)

    def resolve_targets(self, names: Iterable[str] | None) -> tuple[str, ...]:
        """Adapter targets by our names; None: the family's default. They may be given by our names or by the checkpoints'.

        Raises ValueError for one that is not there, for one given twice, and for `gate` where `gate_proj` must be meant.
        """
        if names is None:
            return self.default_targets
        given = tuple(names)
        found = self._ours("target", given)
        if len(set(found)) < len(found):
            twice = next(target for target in found if found.count(target) > 1)
            names_of = [name for name, target in zip(given, found, strict=True) if target == twice]
            raise ValueError(f"LoRA targets {' and '.join(names_of)} are the same: give it once")
        if {"gate", "w3"} <= set(found) and "w1" not in found and self.target_names.get("w1") == "gate_proj":
            raise ValueError("LoRA target gate is the router of a layer, and up_proj is adapted without gate_proj: is that meant instead?")
        return found

    def resolve_share(self, names: Iterable[str]) -> tuple[str, ...]:
        """Targets that have one A together, by our names; the first holds it. Raises ValueError for a name that is not there, and for
        others than those of an expert that read the same rows."""
        given = tuple(names)
        one_input = next(found for stack in self.stacks if (found := stack.block.feed_forward.one_input))
        if sorted(self._ours("share", given)) != sorted(one_input):
            expected = ", ".join(self.target_names.get(target, target) for target in one_input)
            raise ValueError(
                f"LoRA share [{', '.join(given)}]: expected [{expected}], the two matrices of an expert that read the same rows and "
                "are one parameter in transformers 5; every other one has an A of its own"
            )
        return one_input

    def _ours(self, what: str, given: Iterable[str]) -> tuple[str, ...]:
        """Targets by our names, given by ours or the checkpoints'."""
        theirs = self.target_names
        ours = {name: name for name in self.targets} | {name: target for target, name in theirs.items()}
        unknown = [name for name in given if name not in ours]
        if unknown:
            there = [target if theirs.get(target, target) == target else f"{theirs[target]} ({target})" for target in self.targets]
            raise ValueError(f"LoRA {what} {unknown[0]!r} does not exist in a {self.title}: expected some of {', '.join(there)}")
        return tuple(ours[name] for name in given)

    def resolve_groups(self, names: Iterable[str] | None) -> tuple[str, ...]:
        """What is quantized; None: the family's default, but for experts that are in 4 bits already. Raises ValueError where those are
        named."""
        if self.expert_format is None:
            return self.default_quantized if names is None else tuple(names)
        if names is not None and "experts" in names:
            raise ValueError(
                f"modules {list(names)}: the checkpoint's experts are in {self.expert_format.upper()}, and stay so: leave experts out"
            )
        return tuple(name for name in (self.default_quantized if names is None else names) if name != "experts")

    def kinds(self, kind: str | None, names: Iterable[str] | None = None) -> dict[str, str]:
        """Group of frozen weights -> how it is stored in 4 bits (of `quantized.KINDS`): as asked (None: nothing is), and experts as the
        checkpoint has them. Raises ValueError as `resolve_groups`."""
        asked = {} if kind is None else dict.fromkeys(self.resolve_groups(names), kind)
        return asked if self.expert_format is None else asked | {"experts": self.expert_format}
