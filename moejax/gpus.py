"""GPUs by the figures of their vendors' data sheets (gpus.json), and a user's own from YAML, both by the same keys.

Peaks are dense bf16 with fp32 accumulation (no structured sparsity; of V100 and T4, which have no bf16, fp16) of the named form factor;
fp32_tflops are of the cores, tf32_tflops of the tensor cores, from the same NVIDIA data sheets and architecture white papers (the A10G's by
its cores and clock). jax multiplies fp32 in tf32 on compute capability 8.0 and newer, as a program compiled for an A100 shows
(`mma … tf32`); T4 and V100 have none and multiply in fp32.
`device_bytes` is what the driver reports where that is known (with ECC on), a little less than the nominal GB. `cuda_name` is the whole
name that CUDA reports: a Laptop, Ti, D, Max-Q or MIG variant is another device, and no card's figures are taken for it. What a compiler
asks is by XLA's own device specs where there are some (A100, H100, B200, A6000, V100), else by the data sheet.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moejax.errors import UserError

DATA_SHEET = "vendor's data sheet"
Platform = Literal["cpu", "tpu", "sm80", "sm8", "sm9"]  # a GPU by compute capability: A100; other Ampere and Ada; Hopper and later


@dataclass(frozen=True)
class CompilerFigures:
    """What a compiler asks besides the memory. compute_capability: as in "8.6"; l2_mb: MiB of L2 cache; clock_ghz: boost clock."""

    compute_capability: str
    multiprocessors: int
    l2_mb: float
    clock_ghz: float


@dataclass(frozen=True)
class GPU:
    """One GPU. `chip`: cards of one chip share their speed of computing; `device_kind`: a pattern of CUDA's names for it, without the
    maker's."""

    name: str
    memory_gb: float
    bytes_per_second: float
    flops_per_second: float
    chip: str
    aliases: tuple[str, ...] = ()
    cuda_name: str = ""
    device_kind: str | None = None
    device_bytes: int | None = None
    source: str = DATA_SHEET
    bf16: bool = True  # whether it computes in bfloat16
    usable_bytes: int | None = None  # of this machine's own: what jax may take of it
    platform: Platform | None = None  # the kind of program that XLA makes for it; None: by its chip
    compiler: CompilerFigures | None = None
    pcie: int = 4  # generation of its link to the host
    pcie_lanes: int = 16
    fp32: float | None = None  # FLOP/s of the cores
    tf32: float | None = None  # FLOP/s of the tensor cores, of fp32 rounded to tf32

    @property
    def memory_bytes(self) -> int:
        """Of this machine's own card what jax may take."""
        return self.usable_bytes or self.device_bytes or int(self.memory_gb * 1e9)

    def rate(self, dtype: str, *, exact: bool = False) -> float:
        """FLOP/s of products of "bfloat16" or "float32" as jax multiplies them by default; exact: fp32 without rounding to tf32.

        Where a data sheet's figures are unknown: tf32 at half of bf16, and fp32 at an eighth of fp16 on cards without bf16 (as T4, V100)
        or at a quarter of bf16 (as A40, L4). A TPU multiplies in bf16 by default; a CPU's rate is measured in fp32.
        """
        if dtype == "bfloat16" or self.platform in ("cpu", "tpu"):
            return self.flops_per_second
        if self.bf16 and not exact:
            return self.tf32 or self.flops_per_second / 2
        return self.fp32 or self.flops_per_second / (4 if self.bf16 else 8)


def platform_of_capability(capability: str) -> Platform:
    """The kind of program that XLA makes for a GPU of this compute capability ("8.6"); the newest kind for what is no number (AMD's)."""
    if not capability[:1].isdigit() or float(capability) >= 9:
        return "sm9"
    return "sm80" if float(capability) == 8 else "sm8"


def _plain_device(name: str) -> str:
    """CUDA's name without the maker's."""
    return re.sub(r"^(NVIDIA|Tesla|GeForce)\s+", "", re.sub(r"^NVIDIA\s+", "", name.strip()))


_COMPILER_KEYS = tuple(field.name for field in dataclasses.fields(CompilerFigures))


def _gpu(name: str, figures: dict[str, Any], source: str = DATA_SHEET) -> GPU:
    """A GPU of the table's keys; without bf16 where its compute capability has none."""
    compiler = CompilerFigures(**{key: figures[key] for key in _COMPILER_KEYS}) if figures.get(_COMPILER_KEYS[0]) else None
    cuda_name = figures.get("cuda_name")  # of the table alone
    return GPU(
        name, figures["memory_gb"], figures["bandwidth_gb_per_second"] * 1e9, figures["bf16_tflops"] * 1e12,
        str(figures.get("chip", name)), tuple(figures.get("aliases", ())), cuda_name or f"NVIDIA {name}",
        figures.get("device_kind") or (_plain_device(cuda_name) if cuda_name else None), figures.get("device_bytes"), source,
        bf16=figures.get("bf16", compiler is None or float(compiler.compute_capability) >= 8),
        platform=None if compiler is None else platform_of_capability(compiler.compute_capability), compiler=compiler,
        pcie=int(figures.get("pcie", 4)), pcie_lanes=int(figures.get("pcie_lanes", 16)),
        **{name: figures[f"{name}_tflops"] * 1e12 for name in ("fp32", "tf32") if figures.get(f"{name}_tflops")},
    )  # fmt: skip


_TABLE: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
GPUS: dict[str, GPU] = {name: _gpu(name, figures) for name, figures in _TABLE.items()}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia"))


def find(name: str, table: dict[str, GPU] | None = None) -> GPU:
    """The GPU of this name, alias or CUDA's own name, case and punctuation aside. Raises UserError with the nearest names for another."""
    table = GPUS if table is None else table
    names = {_plain(n): gpu for gpu in table.values() for n in (gpu.name, *gpu.aliases)}
    key = _plain(name)
    found = names.get(key) or of_device_kind(name, table)
    if found is not None:
        return found
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.4)
    nearest = list(dict.fromkeys(names[n].name for n in near))
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    raise UserError(f"unknown GPU {name!r}: {hint}Known: {', '.join(table)}; another one can be described in YAML (--gpu-file)")


def of_device_kind(device_kind: str, table: dict[str, GPU] | None = None) -> GPU | None:
    """The GPU that CUDA, jax and torch name so (e.g. "NVIDIA H100 80GB HBM3"), or None. The whole name counts."""
    name = _plain_device(device_kind)
    for gpu in (GPUS if table is None else table).values():
        if gpu.device_kind and re.fullmatch(gpu.device_kind, name):
            return gpu
    return None


def capability(device_kind: str) -> float | None:
    """CUDA's compute capability of a card as jax names it; None where it is unknown."""
    card = of_device_kind(device_kind)
    return None if card is None or card.compiler is None else float(card.compiler.compute_capability)


_NEEDED = ("memory_gb", "bandwidth_gb_per_second", "bf16_tflops")
_NUMBERS = (*_NEEDED, "fp32_tflops", "tf32_tflops", *_COMPILER_KEYS[1:])
_LINK = {"pcie": (3, 4, 5), "pcie_lanes": (1, 2, 4, 8, 16)}
_YAML_KEYS = {*_NUMBERS, "watts", "chip", "source", "bf16", *_COMPILER_KEYS, *_LINK}


def from_yaml(path: str | Path) -> dict[str, GPU]:
    """The table with a user's own GPUs: `NAME: {memory_gb: 32, bandwidth_gb_per_second: 1790, bf16_tflops: 210}`.

    `chip`, `source`, `bf16` (false: it has none, as below compute capability 8), `fp32_tflops`, `tf32_tflops`, `pcie` (generation, 4) and
    `pcie_lanes` (16) are optional, `watts` is not used; with
    `compute_capability: 8.6, multiprocessors: 84, l2_mb: 6, clock_ghz: 1.74` (all four) steps are compiled for it. A name of the table,
    however it is written, replaces that GPU. Raises UserError for a file, key or value that cannot be meant.
    """
    from moejax.yaml_file import read_yaml

    path = Path(path)
    document = read_yaml(path, "--gpu-file ")
    example = "NAME: {memory_gb: 32, bandwidth_gb_per_second: 1790, bf16_tflops: 210}"
    if not isinstance(document, dict) or not all(isinstance(v, dict) and _plain(str(k)) for k, v in document.items()):
        raise UserError(f"--gpu-file {path}: expected lines like `{example}`")
    table = dict(GPUS)
    for name, figures in document.items():
        missing = [key for key in _NEEDED if key not in figures]
        unknown = [key for key in figures if key not in _YAML_KEYS]
        if missing or unknown:
            what = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(map(str, unknown))}"
            raise UserError(f"--gpu-file {path}: {name} {what}; expected `{example}`")
        for key in _NUMBERS:
            value = figures.get(key)
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0.001 <= value <= 1e9
            if not number and (value is not None or key in _NEEDED):
                raise UserError(f"--gpu-file {path}: {name}.{key} = {repr(value)[:40]}: expected a number above 0, as on its data sheet")
        for key, several in _LINK.items():
            if figures.get(key, several[-1]) not in several:
                raise UserError(f"--gpu-file {path}: {name}.{key} = {figures[key]!r}: expected one of {', '.join(map(str, several))}")
        if not isinstance(figures.get("bf16", True), bool):
            raise UserError(f"--gpu-file {path}: {name}.bf16 = {figures['bf16']!r}: expected true or false")
        given = figures | _compiler_figures(f"--gpu-file {path}: {name}", figures)
        gpu = _gpu(str(name), given, source=str(figures.get("source", path.name)))
        if gpu.bf16 and gpu.compiler is not None and float(gpu.compiler.compute_capability) < 8:
            raise UserError(
                f"--gpu-file {path}: {name}.bf16 = true: a GPU of compute_capability {figures['compute_capability']} has no bf16 (8.0 has)"
            )
        table = {known: other for known, other in table.items() if _plain(known) != _plain(str(name))} | {str(name): gpu}
    return table


def _compiler_figures(where: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Those of a user's file, as the table has them. Raises UserError for some without the others, and for what cannot be meant."""
    there = {key: figures[key] for key in _COMPILER_KEYS if figures.get(key) is not None}
    if not there:
        return {}
    if len(there) < len(_COMPILER_KEYS):
        missing = ", ".join(key for key in _COMPILER_KEYS if key not in there)
        raise UserError(f"{where} has {', '.join(there)}, but no {missing}: to compile for it, all are needed (vendor's data sheet)")
    capability, cores = there["compute_capability"], there["multiprocessors"]
    text = f"{capability}.0" if isinstance(capability, int) else str(capability)
    if not re.fullmatch(r"\d{1,2}\.\d", text):
        raise UserError(f"{where}.compute_capability = {capability!r}: expected CUDA's number, as in 8.6 or 12.0")
    if int(cores) != cores:
        raise UserError(f"{where}.multiprocessors = {cores}: expected a whole number")
    return there | {"compute_capability": text, "multiprocessors": int(cores)}


def gpu_name(device: str) -> str:
    """The table's name of a device that jax or torch names so, or its own."""
    found = of_device_kind(device)
    return device if found is None else found.name
