"""The fused adapter format of transformers 5 with PEFT 0.19 or later (`target_parameters`): one pair over all experts of a layer.

transformers 5 holds a layer's experts as `gate_up_proj` [E, 2F, D] (w1's rows, then w3's) and `down_proj` [E, D, F]. PEFT
flattens their pairs: A is [E·r, in], expert-major; B is [out, r·E], its column rank_index·E + expert. With both adapted, gate_up_proj's
pair is the inner one (`experts.base_layer`). w1 and w3 share gate_up_proj's A; two separate pairs of rank r are one of rank 2r.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.hub.names import modules, target_of
from moejax.models.config import Architecture
from moejax.models.config.adapters import Pair

_FUSED = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.mlp\.(gate|router|experts|experts\.base_layer)\.lora_([AB])\.weight")


def parameters(sizes: Architecture) -> dict[str, str]:
    """What an adapter can be on next to attention -> transformers 5's parameter."""
    router = next(name for block in sizes.names.blocks for name, ours in block.renamed.items() if ours == "moe.router.weight")
    return {"gate": f"mlp.{router.split('.')[-2]}.weight", "gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}


def _interleaved(sizes: Architecture) -> bool:
    """Whether gate_up_proj has w1's and w3's rows in turn."""
    return any(block.interleaved for block in sizes.names.blocks)


def fuse(
    tensors: dict[str, np.ndarray], settings: dict[str, Any], sizes: Architecture, pairs: Mapping[str, Pair]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, settings) of a per-expert adapter -> those of the fused one, the same deltas in the same bits. pairs: of each target.

    gate_up_proj has rank r where w1 and w3 have the same A everywhere, else 2r: A = [A1; A3], B = [[B1, 0], [0, B3]].
    Raises UserError where only one of w1 and w3 is adapted, or the two differently: PEFT refuses that too.
    """
    ours = {name: target for target, name in sizes.target_names.items()}
    targets = {ours[name] for name in settings["target_modules"]}
    apart = sorted(name for target, name in sizes.target_names.items() if target in targets and "." in name)
    if apart:
        raise UserError(
            f"the fused format cannot hold the adapters on {', '.join(apart)}: PEFT 0.19 and later take such a name for the experts': use "
            "--format peft"
        )
    if len(targets & {"w1", "w3"}) == 1:
        raise UserError("the fused format adapts w1 and w3 together, and the run only one of them: use --format peft")
    if "w1" in targets and (pairs["w1"].rank, pairs["w1"].alpha) != (pairs["w3"].rank, pairs["w3"].alpha):
        raise UserError("the fused format has one rank and alpha for w1 and w3, and the run two: use --format peft")
    out: dict[str, np.ndarray] = {}
    stacks: dict[tuple[str, str, str], dict[int, np.ndarray]] = {}
    places = modules(sizes)
    for name, value in tensors.items():
        module, _, letter = name.removesuffix(".weight").rpartition(".lora_")
        place = places[module.removeprefix("base_model.model.")]
        layer = ".".join([*module.split(".")[:5], ""])  # base_model.model.model.layers.N.
        if place.path[-1] == "router":
            out[f"{layer}{parameters(sizes)['gate'].removesuffix('.weight')}.lora_{letter}.weight"] = value
        elif place.expert is None:
            out[name] = value
        else:
            stacks.setdefault((layer, place.path[-1], letter), {})[place.expert] = value
    whole = {key: np.stack([experts[e] for e in range(len(experts))]) for key, experts in stacks.items()}
    layers = sorted({prefix for prefix, _, _ in whole})
    up, down = "w1" in targets, "w2" in targets
    shared = up and all(np.array_equal(whole[p, "w1", "A"], whole[p, "w3", "A"]) for p in layers)
    for prefix in layers:
        if down:
            _put(out, f"{prefix}mlp.experts", whole[prefix, "w2", "A"], whole[prefix, "w2", "B"])
        if up:
            a1, a3, b1, b3 = (whole[prefix, w, letter] for letter in "AB" for w in ("w1", "w3"))
            a = a1 if shared else np.concatenate([a1, a3], axis=1)
            if not shared:
                zeros = np.zeros_like(b1)
                b1, b3 = np.concatenate([b1, zeros], axis=2), np.concatenate([zeros, b3], axis=2)
            b = np.stack([b1, b3], axis=2).reshape(len(b1), -1, b1.shape[2]) if _interleaved(sizes) else np.concatenate([b1, b3], axis=1)
            _put(out, f"{prefix}mlp.experts{'.base_layer' if down else ''}", a, b)
    names = parameters(sizes)
    adapted = {target: names[kind] for kind, target in (("gate", "gate"), ("gate_up", "w1"), ("down", "w2")) if target in targets}
    attention = {target: name for name, target in ours.items() if target in targets - {"gate", "w1", "w2", "w3"}}
    keys = attention | {target: name.split(".", 2 if "experts" in name else 1)[-1] for target, name in adapted.items()}
    settings = settings | patterns({target: pairs[target] for target in keys}, keys)
    if up and not shared:
        settings["rank_pattern"]["gate_up_proj"] = 2 * pairs["w1"].rank
        settings["alpha_pattern"]["gate_up_proj"] = 2 * pairs["w1"].alpha
    return out, settings | {
        "target_modules": sorted(attention.values()),
        "target_parameters": list(adapted.values()),
        # PEFT refuses dropout on parameters; it matters in training only.
        "lora_dropout": 0.0,
    }


def patterns(pairs: Mapping[str, Pair], keys: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings of each target's rank and alpha: the experts' for all, and by its key where it is another.

    PEFT 0.21 reads an adapter per expert on transformers 5 by `r` alone, whatever a pattern says of the experts.
    """
    whole = next((pairs[target] for target in ("w1", "w2", "w3") if target in pairs), None) or next(iter(pairs.values()))
    return {
        "r": whole.rank,
        "lora_alpha": whole.alpha,
        "rank_pattern": {keys[target]: p.rank for target, p in pairs.items() if p.rank != whole.rank},
        "alpha_pattern": {keys[target]: p.alpha for target, p in pairs.items() if p.alpha != whole.alpha},
    }


def pair_of(settings: dict[str, Any], key: str, path: Path) -> Pair:
    """Of a module or parameter, by its full name; alpha as plain LoRA would have it: rsLoRA divides by the root of the rank."""
    rank, alpha = (_pattern(settings, pattern, key, settings[value], path) for pattern, value in _PATTERNS)
    return Pair(rank, alpha * rank**0.5 if settings.get("use_rslora") else alpha)


def check_patterns(settings: dict[str, Any], keys: Collection[str], path: Path) -> None:
    """Raises UserError where an expression of a pattern matches none of the modules and parameters that are adapted."""
    for pattern, _ in _PATTERNS:
        for expression in settings.get(pattern) or {}:
            if all(_pattern({pattern: {expression: 1}}, pattern, key, None, path) is None for key in keys):
                raise UserError(f"{_settings(path)}: {pattern} has {expression!r}, which matches nothing that the adapter is on")


def unfuse(
    tensors: dict[str, np.ndarray], settings: dict[str, Any], sizes: Architecture, path: Path, wanted: Mapping[str, Pair]
) -> tuple[dict[str, np.ndarray], dict[str, Pair]]:
    """(tensors, module -> its pair) of the fused adapter as a per-expert one, the same deltas exactly. wanted: the model's, by target.

    A gate_up_proj of twice the rank that is wanted of w1 and w3 is two pairs. Where PEFT trained it on, it is not: it is read as it is
    where its own rank is wanted of them. Where w1 and w3 are to share an A, it is never taken apart. Raises UserError, with file and
    tensor, for a pair that is not whole, of another scale or shape, not finite, or of twice the rank and not two pairs.
    """
    experts, hidden, inner, r = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size, settings["r"]
    named = [str(name) for name in settings["target_parameters"]]
    known = parameters(sizes)
    unknown = [name for name in named if not any(f".{each}".endswith(f".{name}") for each in known.values())]
    if unknown:
        raise UserError(f"{_settings(path)}: target_parameters has {unknown[0]!r}: expected some of {', '.join(known.values())}")
    nested = any(".experts.base_layer." in name for name in tensors)
    outer = "down" if nested or not any(name.endswith("gate_up_proj") for name in named) else "gate_up"
    kinds = {known["gate"].split(".")[1]: "gate", "experts": outer, "experts.base_layer": "gate_up"}
    shapes = {"gate": (1, hidden, experts), "gate_up": (experts, hidden, 2 * inner), "down": (experts, inner, hidden)}
    places, targets = modules(sizes), target_of(sizes)
    names = {(place.path[-1], int(name.split(".")[2]), place.expert): name for name, place in places.items() if place.layer is not None}
    keys = {name: _key(name, kinds, known) for name in tensors}
    check_patterns(settings, set(keys.values()), path)
    one_a = any(pair.shares for pair in wanted.values())
    out: dict[str, np.ndarray] = {}
    found: dict[str, Pair] = {}

    def put(module: str, pair: Pair, a: np.ndarray, b: np.ndarray) -> None:
        found[module] = pair
        out.update({f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b})

    for name in tensors:
        match = _FUSED.fullmatch(name)
        kind = kinds.get(match[2]) if match else None
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        if kind is None and module not in places:
            out[name] = tensors[name]
            continue
        pair = pair_of(settings, keys[name], path)
        target = {"gate": "gate", "gate_up": "w1", "down": "w2"}[kind] if kind else targets.get(module, module)
        if target in wanted and abs(pair.scale - wanted[target].scale) > 1e-6:
            ours = wanted[target]
            raise UserError(
                f"{path}: {keys[name]} has rank {pair.rank}, alpha {pair.alpha:g} by rank_pattern and alpha_pattern: expected rank "
                f"{ours.rank}, alpha {ours.alpha:g} as adapter.rank and adapter.alpha say (gate_up_proj also twice both, without "
                "adapter.share)"
            )
        name_a, name_b = (f"{name.rpartition('.lora_')[0]}.lora_{letter}.weight" for letter in "AB")
        for other in (name_a, name_b):
            if other not in tensors:
                raise UserError(f"{path}: tensor {other!r} is missing: download the adapter again")
        if name == name_b:
            continue
        if match is None or kind is None:
            put(module, pair, tensors[name_a], tensors[name_b])
            continue
        count, columns, rows = shapes[kind]
        why = "another base model or rank, or PEFT 0.18's fused format, which had in and out swapped"
        a = checked(tensors[name_a], name_a, (count * pair.rank, columns), path, why)
        b = checked(tensors[name_b], name_b, (rows, pair.rank * count), path, why)
        layer = int(match[1])
        if ("router", layer, None) not in names:
            raise UserError(f"{path}: tensor {name!r} has no place in this model of {sizes.blocks} layers: another base?")
        if kind == "gate":
            put(names["router", layer, None], pair, a, b)
            continue
        a, b = a.reshape(count, pair.rank, columns), b.reshape(rows, pair.rank, count).transpose(2, 0, 1)
        parts = {"w2": (a, b)}
        if kind == "gate_up":
            one, three = (b[:, 0::2], b[:, 1::2]) if _interleaved(sizes) else np.split(b, 2, axis=1)
            parts = {"w1": (a, one), "w3": (a, three)}
            half = pair.rank // 2
            mixed = one[:, :, half:].any() or three[:, :, :half].any()
            twice = target in wanted and pair.rank == 2 * wanted[target].rank and not one_a
            if twice and (pair.rank > r or not mixed):
                if mixed:
                    raise UserError(
                        f"{path}: tensor {name_b!r} of rank {pair.rank} mixes w1 and w3, so it is not two pairs of rank {half}: expected "
                        f"zeros in both off-diagonal blocks. Rank {pair.rank} and alpha {pair.alpha:g} of w1 and w3 (adapter.rank, "
                        "adapter.alpha by target) read it as it is"
                    )
                parts = {"w1": (a[:, :half], one[:, :, :half]), "w3": (a[:, half:], three[:, :, half:])}
                pair = Pair(half, pair.alpha / 2)
        for w, (pair_a, pair_b) in parts.items():
            for e in range(count):
                put(names[w, layer, e], pair, pair_a[e], pair_b[e])
    return out, found


def _key(name: str, kinds: Mapping[str, str], known: Mapping[str, str]) -> str:
    """The full name of the module or parameter that a tensor is of a pair on: what PEFT's patterns are matched with."""
    match = _FUSED.fullmatch(name)
    module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
    kind = kinds.get(match[2]) if match else None
    return module if match is None or kind is None else f"model.layers.{match[1]}.{known[kind]}"


_PATTERNS = (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))


def _put(out: dict[str, np.ndarray], module: str, a: np.ndarray, b: np.ndarray) -> None:
    """a: [E, r, in], b: [E, out, r], laid out as PEFT does."""
    out[f"{module}.lora_A.weight"] = a.reshape(-1, a.shape[-1])
    out[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.transpose(1, 2, 0)).reshape(b.shape[1], -1)


def _pattern(settings: dict[str, Any], pattern: str, key: str, default: Any, path: Path) -> Any:
    """What the first matching expression of the pattern gives for this parameter or module: PEFT's rule."""
    for expression, value in (settings.get(pattern) or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({expression})$", key)
        except re.error as error:
            raise UserError(f"{_settings(path)}: {pattern} has {expression!r}, no regular expression ({error})") from None
        if matches:
            types, expected = ((int,), "a whole number") if pattern == "rank_pattern" else ((int, float), "a number")
            if type(value) not in types or not 0 < value < math.inf:
                raise UserError(f"{_settings(path)}: {pattern} has {expression!r}: {value!r}: expected {expected} above 0")
            return value
    return default


def _settings(path: Path) -> Path:
    """Of the adapter whose tensors are at `path`."""
    return path.with_name("adapter_config.json")


def checked(value: np.ndarray, name: str, shape: tuple[int, ...], path: Path, why: str) -> np.ndarray:
    """A tensor of this shape, of finite numbers. why: what another shape may mean. Raises UserError."""
    if value.shape != shape:
        raise UserError(f"{path}: tensor {name!r} has shape {list(value.shape)}, expected {list(shape)}: {why}")
    if not np.isfinite(value.astype(np.float32)).all():
        raise UserError(f"{path}: tensor {name!r} holds numbers that are not finite")
    return value
