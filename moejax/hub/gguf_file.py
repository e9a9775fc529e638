"""Models as GGUF files, in the layout that llama.cpp computes: written a tensor at a time, and read back under the Hub's names.

What llama.cpp expects of an architecture (names, order of rotary pairs, what is always in fp32) is what its convert_hf_to_gguf.py writes
and its src/models/*.cpp read; checked with llama.cpp itself (`tests/runs/test_llama_cpp.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Stored

from moejax.errors import UserError
from moejax.files import replacing
from moejax.hub.names import Place, tensors
from moejax.hub.stored import Source
from moejax.models.config import FAMILIES, Architecture, specs


class _Form(NamedTuple):
    """How llama.cpp computes a family. interleaved: its rotary positions turn neighbours, not a head's halves; renormalizes: the weights of
    a token's experts sum to one; square: q, k and v are as wide as the stream; tied: it takes the embedding where there is no head."""

    architecture: str
    interleaved: bool
    renormalizes: bool
    square: bool = False
    tied: bool = True


_FORMS = {
    "mixtral": _Form("llama", interleaved=True, renormalizes=True),
    "qwen3_moe": _Form("qwen3moe", interleaved=False, renormalizes=True),
    "olmoe": _Form("olmoe", interleaved=False, renormalizes=False, square=True, tied=False),
}
"""model_type -> …"""

TYPES = {
    "f16": (Stored.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Stored.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Stored.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""--type -> how matrices are stored, and what llama.cpp calls such a file."""

_NAMES = {
    "embed": "token_embd", "norm": "output_norm", "head": "output", "attention_norm": "attn_norm", "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k", "attention.v_proj": "attn_v", "attention.o_proj": "attn_output", "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm", "moe_norm": "ffn_norm", "moe.router": "ffn_gate_inp", "moe.w1": "ffn_gate_exps",
    "moe.w2": "ffn_down_exps", "moe.w3": "ffn_up_exps",
}  # fmt: skip
"""A module of ours -> llama.cpp's, of a block where it is of one."""

_SIZES = {
    "num_layers": gguf.Keys.LLM.BLOCK_COUNT, "max_position_embeddings": gguf.Keys.LLM.CONTEXT_LENGTH,
    "hidden_size": gguf.Keys.LLM.EMBEDDING_LENGTH, "num_heads": gguf.Keys.Attention.HEAD_COUNT,
    "num_kv_heads": gguf.Keys.Attention.HEAD_COUNT_KV, "head_dim": gguf.Keys.Attention.KEY_LENGTH,
    "rope_theta": gguf.Keys.Rope.FREQ_BASE, "rms_norm_eps": gguf.Keys.Attention.LAYERNORM_RMS_EPS,
    "num_experts": gguf.Keys.LLM.EXPERT_COUNT, "experts_per_token": gguf.Keys.LLM.EXPERT_USED_COUNT,
    "vocab_size": gguf.Keys.LLM.VOCAB_SIZE, "intermediate_size": gguf.Keys.LLM.FEED_FORWARD_LENGTH,
}  # fmt: skip
"""A field of the architecture -> the key of it."""


def check(config: Architecture, kind: str) -> None:
    """Raises UserError for a family, a type or a model that llama.cpp does not compute, or that is not written here."""
    form = _FORMS.get(config.model_type)
    if form is None:
        known = ", ".join(FAMILIES[name].title for name in _FORMS)
        raise UserError(f"--format gguf: a {config.title} is not written as GGUF: {known} are. Use --format merged")
    if kind not in TYPES:
        raise UserError(f"--type {kind}: expected one of {', '.join(TYPES)} (other types: llama.cpp's own quantizer, docs/hub.md)")
    if vars(config).get("rope_scaling") is not None:
        raise UserError(
            "--format gguf: the base's rotary positions are scaled (rope_scaling of its config.json), which is not written as GGUF. Use "
            "--format merged, or train without it"
        )
    experts = config.stacks[0].block.feed_forward
    assert isinstance(experts, specs.MoE)  # of every family that is written
    if (renormalizes := experts.router.renormalize) != form.renormalizes:
        raise UserError(
            f"--format gguf: norm_topk_prob is {str(renormalizes).lower()} here, and llama.cpp computes every {config.title} with "
            f"{str(form.renormalizes).lower()}: it would answer otherwise. Use --format merged"
        )
    widths = {config.linears[config.stacks[0].name, "attention", name][0].out for name in ("q_proj", "k_proj", "v_proj")}
    if form.square and widths != {config.hidden_size}:
        raise UserError(
            f"--format gguf: llama.cpp computes an {config.title} whose q, k and v are as wide as the model, {config.hidden_size}; here "
            f"they are {', '.join(map(str, sorted(widths)))} wide. Use --format merged"
        )


class _Tensor(NamedTuple):
    """One of the file: the Hub tensors that lie in it one after the other, each [rows, columns] or [columns]; halves: of how many heads the
    rows' halves are interleaved (0: none)."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    stored: Stored
    halves: int = 0

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return tuple(gguf.quant_shape_to_byte_shape(self.shape, self.stored))

    @property
    def nbytes(self) -> int:
        return math.prod(self.byte_shape)


def _layout(config: Architecture, kind: str) -> dict[str, _Tensor]:
    """llama.cpp's name -> what it holds, in the order of the file."""
    form, wanted = _FORMS[config.model_type], TYPES[kind][0]
    parts: dict[str, list[str]] = {}
    places: dict[str, Place] = {}
    for name, (place,) in tensors(config).items():
        module = ".".join(place.path if place.layer is None else place.path[1:])
        own = f"{_NAMES[module]}.weight" if place.layer is None else f"blk.{place.layer}.{_NAMES[module]}.weight"
        parts.setdefault(own, []).append(name)
        places[own] = place
    if config.tie_word_embeddings and not form.tied:
        parts["output.weight"], places["output.weight"] = parts["token_embd.weight"], places["token_embd.weight"]
    layout = {}
    for own, names in parts.items():
        place = places[own]
        shape = config.weights[(*place.path, place.attr)][place.layer is not None :]
        heads = {"q_proj": "num_heads", "k_proj": "num_kv_heads"}.get(place.path[-1]) if form.interleaved else None
        layout[own] = _Tensor(tuple(names), shape, _stored(place, shape, wanted), getattr(config, heads) if heads else 0)
    return layout


def _stored(place: Place, shape: tuple[int, ...], wanted: Stored) -> Stored:
    """As llama.cpp's converter has it: norms and routers in fp32, and f16 where a row is no whole number of blocks."""
    if len(shape) == 1 or place.path[-1] == "router":
        return Stored.F32
    return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else Stored.F16


def file_bytes(config: Architecture, kind: str) -> int:
    """What the tensors of a file take."""
    return sum(tensor.nbytes for tensor in _layout(config, kind).values())


def write(
    path: Path, config: Architecture, kind: str, value: Callable[[str], np.ndarray], more: Mapping[str, Any],
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:  # fmt: skip
    """Write the GGUF file of a model, whole or not at all; in memory is one Hub tensor.

    value: the fp32 numbers of a Hub tensor. more: keys beyond the architecture's (`data.gguf_tokenizer`, the name). advance: called with
    the bytes of each part. Raises UserError where a number is beyond f16, OSError for a full disk.
    """
    layout, form = _layout(config, kind), _FORMS[config.model_type]
    with replacing(path) as new:
        writer = gguf.GGUFWriter(new, form.architecture)
        try:
            for key, content in (_keys(config, kind) | dict(more)).items():
                _add(writer, key, content)
            for name, tensor in layout.items():
                writer.add_tensor_info(name, tensor.byte_shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=tensor.stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in layout.values():
                writer.write_tensor_data(_Stream(tensor, value, advance))  # type: ignore[arg-type]
        finally:
            writer.close()


class _Stream:
    """A tensor whose parts are made when they are written: what `write_tensor_data` asks of an array."""

    def __init__(self, tensor: _Tensor, value: Callable[[str], np.ndarray], advance: Callable[[int], None]) -> None:
        self.nbytes, self._tensor, self._value, self._advance = tensor.nbytes, tensor, value, advance

    def tofile(self, file: Any) -> None:
        for name in self._tensor.parts:
            data = _encoded(_turned(self._value(name), self._tensor.halves), self._tensor.stored, name)
            file.write(data.reshape(-1).view(np.uint8).data)
            self._advance(data.nbytes)


def _turned(value: np.ndarray, heads: int, back: bool = False) -> np.ndarray:
    """[rows, …]: in each head the rows of its halves alternating (row i, row i + half); back: the other way round."""
    if not heads:
        return value
    half = value.shape[0] // heads // 2
    split = (heads, half, 2) if back else (heads, 2, half)
    return np.ascontiguousarray(value.reshape(*split, *value.shape[1:]).swapaxes(1, 2)).reshape(value.shape)


def _encoded(value: np.ndarray, stored: Stored, name: str) -> np.ndarray:
    if stored is Stored.BF16:
        return value.astype(ml_dtypes.bfloat16)
    if stored is Stored.F16 and float(np.abs(value).max(initial=0.0)) > float(np.finfo(np.float16).max):
        raise UserError(f"tensor {name!r} holds {np.abs(value).max():g}, and f16 ends at 65504: use --type bf16")
    encoded: np.ndarray = gguf.quants.quantize(value, stored)
    return encoded


def _keys(config: Architecture, kind: str) -> dict[str, Any]:
    """The architecture's metadata."""
    name, given = _FORMS[config.model_type].architecture, vars(config)
    sizes = {key: given[field] for field, key in _SIZES.items()}
    head = dict.fromkeys((gguf.Keys.Attention.VALUE_LENGTH, gguf.Keys.Rope.DIMENSION_COUNT), given["head_dim"])
    experts = {gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: given["intermediate_size"]}
    general = {"general.type": "model", "general.file_type": int(TYPES[kind][1]), "general.quantization_version": gguf.GGML_QUANT_VERSION}
    return general | {key.format(arch=name): content for key, content in (sizes | head | experts).items()}


def _add(writer: gguf.GGUFWriter, key: str, content: Any) -> None:
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
    }  # fmt: skip
    add[type(content)](key, content)


class _File:
    """A written file's tensors under the Hub's names: what `Source` asks of a file."""

    def __init__(self, path: Path, config: Architecture, kind: str) -> None:
        self.path = path
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        self._where = {
            name: (found[own], tensor, number) for own, tensor in _layout(config, kind).items() for number, name in enumerate(tensor.parts)
        }

    def names(self) -> Iterator[str]:
        yield from self._where

    def shape(self, name: str) -> tuple[int, ...]:
        _, tensor, _ = self._where[name]
        return tensor.shape[len(tensor.parts) > 1 :]

    def dtype(self, name: str) -> np.dtype[Any]:
        stored = self._where[name][1].stored
        kinds: dict[Stored, Any] = {Stored.BF16: ml_dtypes.bfloat16, Stored.F16: np.float16}
        return np.dtype(kinds.get(stored, np.float32))

    def read(self, name: str, into: np.ndarray, first: int = 0) -> np.ndarray:
        held, tensor, number = self._where[name]
        data = held.data[number] if len(tensor.parts) > 1 else held.data
        into[...] = _turned(gguf.quants.dequantize(np.asarray(data), tensor.stored), tensor.halves, back=True)
        return into


def open_tensors(path: Path, config: Architecture, kind: str) -> dict[str, Source]:
    """As `stored.open_tensors`, of a file that `write` wrote: values as they were before they were stored, but for the rounding."""
    file = _File(path, config, kind)
    return {name: Source(file, name, file.shape(name)) for name in file.names()}


def read_sizes(path: Path, config: Architecture) -> Architecture:
    """`config` with the sizes that a file's metadata say."""
    fields, name = gguf.GGUFReader(path).fields, _FORMS[config.model_type].architecture
    here, read = vars(config), {field: fields[key.format(arch=name)].contents() for field, key in _SIZES.items()}
    same = {field: here[field] if np.float32(here[field]) == value else value for field, value in read.items()}  # floats are fp32 there
    return config.replace(expert_format=None, **same)
