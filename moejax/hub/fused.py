"""The fused adapter format of transformers 5 with PEFT 0.19 or later (`target_parameters`): one pair over all experts of a layer.

transformers 5 holds a layer's experts as `gate_up_proj` [E, 2F, D] (w1's rows, then w3's) and `down_proj` [E, D, F]. PEFT
flattens their pairs: A is [E·r, in], expert-major; B is [out, r·E], its column rank_index·E + expert. With both adapted, gate_up_proj's
pair is the inner one (`experts.base_layer`). w1 and w3 share gate_up_proj's A; two separate pairs of rank r are one of rank 2r.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from moejax.errors import UserError
from moejax.hub.names import modules
from moejax.models.config import Architecture

_FUSED = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.mlp\.(gate|experts|experts\.base_layer)\.lora_([AB])\.weight")
PARAMETERS = {"gate": "mlp.gate.weight", "gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}


def fuse(
    tensors: dict[str, np.ndarray], settings: dict[str, Any], sizes: Architecture
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, settings) of a per-expert adapter -> those of the fused one, the same deltas in the same bits.

    gate_up_proj has rank r where w1 and w3 have the same A everywhere, else 2r: A = [A1; A3], B = [[B1, 0], [0, B3]].
    Raises UserError where only one of w1 and w3 is adapted: PEFT refuses that too.
    """
    ours = {name: target for target, name in sizes.target_names.items()}
    targets = {ours[name] for name in settings["target_modules"]}
    if len(targets & {"w1", "w3"}) == 1:
        raise UserError("the fused format adapts w1 and w3 together, and the run only one of them: use --format peft")
    out: dict[str, np.ndarray] = {}
    stacks: dict[tuple[str, str, str], dict[int, np.ndarray]] = {}
    places = modules(sizes)
    for name, value in tensors.items():
        module, _, letter = name.removesuffix(".weight").rpartition(".lora_")
        place = places[module.removeprefix("base_model.model.")]
        layer = f"base_model.model.model.layers.{place.layer}."
        if place.path[-1] == "router":
            out[f"{layer}mlp.gate.lora_{letter}.weight"] = value
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
            _put(out, f"{prefix}mlp.experts{'.base_layer' if down else ''}", a, np.concatenate([b1, b3], axis=1))
    present = {"gate": "gate" in targets, "gate_up": up, "down": down}
    doubled = up and not shared
    return out, settings | {
        "target_modules": sorted(name for name, target in ours.items() if target in targets - {"gate", "w1", "w2", "w3"}),
        "target_parameters": [PARAMETERS[name] for name, wanted in present.items() if wanted],
        # PEFT refuses dropout on parameters; it matters in training only.
        "lora_dropout": 0.0,
        "rank_pattern": {"gate_up_proj": 2 * settings["r"]} if doubled else {},
        "alpha_pattern": {"gate_up_proj": 2 * settings["lora_alpha"]} if doubled else {},
    }


def unfuse(
    tensors: dict[str, np.ndarray], settings: dict[str, Any], sizes: Architecture, path: Path, wanted: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, settings) of the fused adapter as those of a per-expert one of rank settings["r"], the same deltas exactly.

    A gate_up_proj of twice the rank is two pairs of rank r. Where PEFT trained it on, it is not: its w1 and w3 share an A of rank 2r.
    wanted = 2r reads that as it is, and fills every other pair up to rank 2r with zeros (which have no gradient, so they stay zeros).
    Raises UserError, with file and tensor, for a pair that is not whole, of another rank, scale or shape, not finite, or of rank 2r
    and not two pairs of rank r.
    """
    experts, hidden, inner, r = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size, settings["r"]
    named = [str(name) for name in settings["target_parameters"]]
    unknown = [name for name in named if not any(f".{known}".endswith(f".{name}") for known in PARAMETERS.values())]
    if unknown:
        raise UserError(f"{path}: target_parameters has {unknown[0]!r}: expected some of {', '.join(PARAMETERS.values())}")
    nested = any(".experts.base_layer." in name for name in tensors)
    outer = "down" if nested or not any(name.endswith("gate_up_proj") for name in named) else "gate_up"
    kinds = {"gate": "gate", "experts": outer, "experts.base_layer": "gate_up"}
    shapes = {"gate": (1, hidden, experts), "gate_up": (experts, hidden, 2 * inner), "down": (experts, inner, hidden)}
    names = {(place.path[-1], place.layer, place.expert): name for name, place in modules(sizes).items()}
    out: dict[str, np.ndarray] = {}
    doubled = False
    for name in tensors:
        match = _FUSED.fullmatch(name)
        kind = kinds[match[2]] if match else None
        module = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        key = f"{module.partition('.mlp.')[0]}.{PARAMETERS[kind]}" if kind else module
        rank, alpha = (_pattern(settings, pattern, key, settings[value], path) for pattern, value in _PATTERNS)
        if rank not in ((r, 2 * r) if kind == "gate_up" else (r,)) or abs(alpha / rank - settings["lora_alpha"] / r) > 1e-6:
            raise UserError(
                f"{path}: {key} has rank {rank}, alpha {alpha} by rank_pattern and alpha_pattern: expected rank {r}, alpha "
                f"{settings['lora_alpha']} as the rest has (gate_up_proj also twice both)"
            )
        if match is None or kind is None:
            out[name] = tensors[name]
            continue
        if match[3] == "B":
            if name.replace(".lora_B.", ".lora_A.") not in tensors:
                raise UserError(f"{path}: tensor {name.replace('.lora_B.', '.lora_A.')!r} is missing: download the adapter again")
            continue
        name_b = name.replace(".lora_A.", ".lora_B.")
        if name_b not in tensors:
            raise UserError(f"{path}: tensor {name_b!r} is missing: download the adapter again")
        count, columns, rows = shapes[kind]
        a = _checked(tensors[name], name, (count * rank, columns), path)
        b = _checked(tensors[name_b], name_b, (rows, rank * count), path)
        layer = int(match[1])
        if layer >= sizes.blocks:
            raise UserError(f"{path}: tensor {name!r} has no place in a model of {sizes.blocks} layers: another base model?")
        if kind == "gate":
            own = f"base_model.model.{names['router', layer, None]}"
            out |= {f"{own}.lora_A.weight": a, f"{own}.lora_B.weight": b}
            continue
        a, b = a.reshape(count, rank, columns), b.reshape(rows, rank, count).transpose(2, 0, 1)
        pairs = {"w2": (a, b)}
        if kind == "gate_up":
            parts = {"w1": slice(0, r), "w3": slice(rank - r, rank)}
            halves = dict(zip(parts, np.split(b, 2, axis=1), strict=True))
            doubled |= rank == 2 * r
            if rank == wanted == 2 * r:
                parts = dict.fromkeys(parts, slice(None))
            elif rank == 2 * r and (halves["w1"][:, :, r:].any() or halves["w3"][:, :, :r].any()):
                raise UserError(
                    f"{path}: tensor {name_b!r} of rank {rank} mixes w1 and w3, so it is not two pairs of rank {r}: expected zeros in "
                    f"both off-diagonal blocks. adapter.rank={rank} adapter.alpha={alpha:g} reads it as it is"
                )
            pairs = {w: (a[:, part], halves[w][:, :, part]) for w, part in parts.items()}
        for w, (pair_a, pair_b) in pairs.items():
            for e in range(count):
                own = f"base_model.model.{names[w, layer, e]}"
                out |= {f"{own}.lora_A.weight": pair_a[e], f"{own}.lora_B.weight": pair_b[e]}
    if not doubled or wanted != 2 * r:
        return out, settings
    return {name: _filled_up(value, name, 2 * r) for name, value in out.items()}, settings | {
        "r": 2 * r,
        "lora_alpha": 2 * settings["lora_alpha"],
    }


def _filled_up(value: np.ndarray, name: str, rank: int) -> np.ndarray:
    """A or B of at most this rank, with zeros up to it."""
    axis = 0 if ".lora_A." in name else 1
    missing = [(0, 0), (0, 0)]
    missing[axis] = (0, max(0, rank - value.shape[axis]))
    return np.pad(value, missing)


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
            raise UserError(f"{path}: {pattern} has {expression!r}, no regular expression ({error})") from None
        if matches:
            if not isinstance(value, int | float) or value <= 0:
                raise UserError(f"{path}: {pattern} has {expression!r}: {value!r}: expected a positive number")
            return value
    return default


def _checked(value: np.ndarray, name: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    if value.shape != shape:
        raise UserError(
            f"{path}: tensor {name!r} has shape {list(value.shape)}, expected {list(shape)}: another base model or rank, or PEFT 0.18's "
            "fused format, which had in and out swapped"
        )
    if not np.isfinite(value.astype(np.float32)).all():
        raise UserError(f"{path}: tensor {name!r} holds numbers that are not finite")
    return value
