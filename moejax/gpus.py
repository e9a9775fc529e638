"""GPUs by the figures of their vendors' data sheets, and a user's own from YAML.

Peaks are dense bf16 (no structured sparsity) of the named form factor. `device_bytes` is what the driver reports where that is known,
a little less than the nominal GB; `matrix_flops_per_second` is what large matrix products were measured to reach, where they were.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moejax.errors import UserError

DATA_SHEET = "vendor's data sheet"
Platform = Literal["cpu", "sm80", "sm8", "sm9"]  # a GPU by compute capability: A100; other Ampere and Ada; Hopper and later


@dataclass(frozen=True)
class CompilerFigures:
    """What a compiler asks beside the memory. compute_capability: as in "8.6"; l2_mb: MiB of second-level cache; clock_ghz: boost clock."""

    compute_capability: str
    multiprocessors: int
    l2_mb: float
    clock_ghz: float


@dataclass(frozen=True)
class GPU:
    """One GPU. `chip`: cards of one chip share their speed of computing; `device_kind`: a pattern of CUDA's whole name for it."""

    name: str
    memory_gb: float
    bytes_per_second: float
    flops_per_second: float
    watts: float | None
    chip: str
    aliases: tuple[str, ...] = ()
    device_kind: str | None = None
    device_bytes: int | None = None
    matrix_flops_per_second: float | None = None
    source: str = DATA_SHEET
    bf16: bool = True  # whether it computes in bfloat16
    usable_bytes: int | None = None  # of this machine's own: what jax may take of it
    platform: Platform | None = None  # the kind of program that XLA makes for it; None: by its chip
    compiler: CompilerFigures | None = None  # of a user's file; those of the table stand in targets.py

    @property
    def ridge_flops_per_byte(self) -> float:
        """FLOPs per byte from memory above which the peak and not the bandwidth is the limit."""
        return self.flops_per_second / self.bytes_per_second


def _gpu(name: str, gb: float, gb_per_s: float, tflops: float, watts: float, chip: str, *aliases: str, **more: Any) -> GPU:
    return GPU(name, gb, gb_per_s * 1e9, tflops * 1e12, watts, chip, aliases, **more)


# Memory GB, bandwidth GB/s, dense bf16 TFLOP/s with fp32 accumulation (V100, T4: fp16, they have no bf16), W. Names with a 40 or 80 come
# before those without. `device_kind` is the whole name that CUDA reports, without "NVIDIA", "Tesla" or "GeForce": a Laptop, Ti, D, Max-Q or
# MIG variant is another device, and no card's figures are taken for it. `device_bytes` of cards with ECC is with ECC on.
_TABLE = (
    _gpu("A40", 48, 696, 149.7, 300, "GA102-A40", device_kind="A40", device_bytes=47608692736),
    _gpu("A100-40", 40, 1555, 312, 400, "GA100", "A100-40GB", "A100-SXM4-40GB", "A100", device_kind="A100-(SXM4|SXM|PCIE)-40GB",
         device_bytes=42500000000, matrix_flops_per_second=271e12),
    _gpu("A100-80", 80, 2039, 312, 400, "GA100", "A100-80GB", "A100-80GB-SXM", "A100-SXM4-80GB",
         device_kind="A100-(SXM4|SXM|PCIE)-80GB|A100 80GB PCIe", device_bytes=85100068864, matrix_flops_per_second=271e12),
    _gpu("H100-PCIe", 80, 2000, 756, 350, "GH100-PCIe", "H100-PCIE-80GB", device_kind="H100 PCIe", device_bytes=84942979072),
    _gpu("H100-NVL", 94, 3938, 835, 400, "GH100-NVL", "H100-94GB", "H100-NVL-94GB", device_kind="H100 NVL"),
    _gpu("H100", 80, 3350, 989, 700, "GH100-SXM", "H100-SXM", "H100-80GB", "H100-80GB-HBM3", "H100-SXM5", device_kind="H100( 80GB HBM3)?",
         device_bytes=84942979072, matrix_flops_per_second=794e12),
    _gpu("GH200", 96, 4000, 990, 1000, "GH100-SXM", "GH200-96GB", "GH200-480GB", device_kind="GH200 480GB", device_bytes=101400000000),
    _gpu("H200", 141, 4800, 989, 700, "GH100-SXM", "H200-SXM", "H200-141GB", device_kind="H200", device_bytes=151400000000,
         matrix_flops_per_second=785e12),
    _gpu("B200", 180, 8000, 2250, 1000, "GB100", "B200-SXM", device_kind="B200", device_bytes=191514411008,
         matrix_flops_per_second=1745e12),
    _gpu("L4", 24, 300, 121, 72, "AD104", device_kind="L4", device_bytes=23609475072),
    _gpu("L40S", 48, 864, 362, 350, "AD102-L40S", device_kind="L40S", device_bytes=47670000000),
    _gpu("RTX-3090", 24, 936, 71, 350, "GA102-3090", "3090", "GeForce-RTX-3090", device_kind="RTX 3090", device_bytes=25400000000),
    _gpu("RTX-4090", 24, 1008, 165, 450, "AD102-4090", "4090", "GeForce-RTX-4090", device_kind="RTX 4090", device_bytes=25380000000),
    _gpu("RTX-5090", 32, 1792, 209.5, 575, "GB202-5090", "5090", "GeForce-RTX-5090", device_kind="RTX 5090", device_bytes=33670000000),
    _gpu("A6000", 48, 768, 154.8, 300, "GA102-A6000", "RTX-A6000", device_kind="RTX A6000", device_bytes=51041271808),
    _gpu("RTX-6000-Ada", 48, 960, 364.2, 300, "AD102-6000", "RTX-6000-Ada-Generation", device_kind="RTX 6000 Ada Generation",
         device_bytes=47700000000),
    _gpu("RTX-PRO-6000", 96, 1792, 503.8, 600, "GB202-6000", "RTX-PRO-6000-Blackwell", "RTX-PRO-6000-Blackwell-Workstation-Edition",
         device_kind="RTX PRO 6000 Blackwell Workstation Edition", device_bytes=101970000000),
    _gpu("RTX-A2000-12", 12, 288, 31.9, 70, "GA106", "RTX-A2000-12GB", "A2000-12GB", device_kind="RTX A2000 12GB"),
    _gpu("A10G", 24, 600, 70, 300, "GA102-A10G", device_kind="A10G", device_bytes=23690000000),
    _gpu("T4", 16, 320, 65, 70, "TU104", device_kind="T4", device_bytes=15630000000, bf16=False),
    _gpu("V100-16", 16, 900, 125, 300, "GV100", "V100", "V100-16GB", device_kind="V100-(SXM2|PCIE)-16GB", bf16=False),
    _gpu("V100-32", 32, 900, 125, 300, "GV100", "V100-32GB", device_kind="V100-(SXM2|SXM3|PCIE)-32GB", bf16=False),
)  # fmt: skip

def platform_of_capability(capability: str) -> Platform:
    """The kind of program that XLA makes for a GPU of this compute capability ("8.6"); the newest kind for what is no number (AMD's)."""
    if not capability[:1].isdigit() or float(capability) >= 9:
        return "sm9"
    return "sm80" if float(capability) == 8 else "sm8"


GPUS: dict[str, GPU] = {gpu.name: gpu for gpu in _TABLE}


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
    name = re.sub(r"^(NVIDIA|Tesla|GeForce)\s+", "", re.sub(r"^NVIDIA\s+", "", device_kind.strip()))
    for gpu in (GPUS if table is None else table).values():
        if gpu.device_kind and re.fullmatch(gpu.device_kind, name):
            return gpu
    return None


_YAML_KEYS = {"memory_gb": True, "bandwidth_gb_per_second": True, "bf16_tflops": True, "watts": False, "chip": False, "source": False,
              "bf16": False}  # fmt: skip
_COMPILER_KEYS = tuple(field.name for field in dataclasses.fields(CompilerFigures))


def from_yaml(path: str | Path) -> dict[str, GPU]:
    """The table with a user's own GPUs: `NAME: {memory_gb: 32, bandwidth_gb_per_second: 1790, bf16_tflops: 210}`.

    `watts`, `chip`, `source` and `bf16` (false: it has none, as below compute capability 8) are optional; with `compute_capability: 8.6,
    multiprocessors: 84, l2_mb: 6, clock_ghz: 1.74` (all four) steps are compiled for it. A name of the table, however it is written,
    replaces that GPU. Raises UserError for a file, key or value that cannot be meant.
    """
    from moejax.yaml_file import read_yaml

    path = Path(path)
    document = read_yaml(path, "--gpu-file ")
    example = "NAME: {memory_gb: 32, bandwidth_gb_per_second: 1790, bf16_tflops: 210}"
    if not isinstance(document, dict) or not all(isinstance(v, dict) and _plain(str(k)) for k, v in document.items()):
        raise UserError(f"--gpu-file {path}: expected lines like `{example}`")
    table = dict(GPUS)
    for name, figures in document.items():
        missing = [key for key, needed in _YAML_KEYS.items() if needed and key not in figures]
        unknown = [key for key in figures if key not in (*_YAML_KEYS, *_COMPILER_KEYS)]
        if missing or unknown:
            what = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(map(str, unknown))}"
            raise UserError(f"--gpu-file {path}: {name} {what}; expected `{example}`")
        for key in ("memory_gb", "bandwidth_gb_per_second", "bf16_tflops", "watts", "multiprocessors", "l2_mb", "clock_ghz"):
            value = figures.get(key, 1)
            if value is None and not _YAML_KEYS.get(key):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0.001 <= value <= 1e9:
                raise UserError(f"--gpu-file {path}: {name}.{key} = {repr(value)[:40]}: expected a number above 0, as on its data sheet")
        if not isinstance(figures.get("bf16", True), bool):
            raise UserError(f"--gpu-file {path}: {name}.bf16 = {figures['bf16']!r}: expected true or false")
        compiler = _compiler_figures(f"--gpu-file {path}: {name}", figures)
        able = compiler is None or float(compiler.compute_capability) >= 8
        if not able and figures.get("bf16"):
            raise UserError(
                f"--gpu-file {path}: {name}.bf16 = true: a GPU of compute_capability {figures['compute_capability']} has no bf16 (8.0 has)"
            )
        gpu = _gpu(str(name), figures["memory_gb"], figures["bandwidth_gb_per_second"], figures["bf16_tflops"],
                   figures.get("watts"), str(figures.get("chip", name)), bf16=figures.get("bf16", able))  # fmt: skip
        table = {known: other for known, other in table.items() if _plain(known) != _plain(str(name))}
        platform = None if compiler is None else platform_of_capability(compiler.compute_capability)
        table[str(name)] = dataclasses.replace(gpu, source=str(figures.get("source", path.name)), compiler=compiler, platform=platform)
    return table


def _compiler_figures(where: str, figures: dict[str, Any]) -> CompilerFigures | None:
    """Those of a GPU in a user's file, or None. Raises UserError for some without the others, and for what cannot be meant."""
    there = [key for key in _COMPILER_KEYS if figures.get(key) is not None]
    if not there:
        return None
    if len(there) < len(_COMPILER_KEYS):
        missing = ", ".join(key for key in _COMPILER_KEYS if key not in there)
        raise UserError(f"{where} has {', '.join(there)}, but no {missing}: to compile for it, all are needed (vendor's data sheet)")
    capability, cores = figures["compute_capability"], figures["multiprocessors"]
    text = f"{capability}.0" if isinstance(capability, int) else str(capability)
    if not re.fullmatch(r"\d{1,2}\.\d", text):
        raise UserError(f"{where}.compute_capability = {capability!r}: expected CUDA's number, as in 8.6 or 12.0")
    if int(cores) != cores:
        raise UserError(f"{where}.multiprocessors = {cores}: expected a whole number")
    return CompilerFigures(text, int(cores), float(figures["l2_mb"]), float(figures["clock_ghz"]))


def gpu_name(device: str) -> str:
    """The table's name of a device that jax or torch names so, or its own."""
    found = of_device_kind(device)
    return device if found is None else found.name
