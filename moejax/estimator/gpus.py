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
from typing import Any

from moejax.errors import UserError

DATA_SHEET = "vendor's data sheet"


@dataclass(frozen=True)
class GPU:
    """One GPU. `chip`: cards of one chip share their speed of computing; `device_kind`: a pattern of jax's name for it."""

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

    @property
    def ridge_flops_per_byte(self) -> float:
        """FLOPs per byte from memory above which the peak and not the bandwidth is the limit."""
        return self.flops_per_second / self.bytes_per_second


def _gpu(name: str, gb: float, gb_per_s: float, tflops: float, watts: float, chip: str, *aliases: str, **more: Any) -> GPU:
    return GPU(name, gb, gb_per_s * 1e9, tflops * 1e12, watts, chip, aliases, **more)


# Memory GB, bandwidth GB/s, dense bf16 TFLOP/s (V100: fp16, it has no bf16), W. Names with a 40 or 80 come before those without.
_TABLE = (
    _gpu("A40", 48, 696, 149.7, 300, "GA102-A40", device_kind=r"\bA40\b", device_bytes=47608692736),
    _gpu("A100-40", 40, 1555, 312, 400, "GA100", "A100-40GB", "A100-SXM4-40GB", "A100", device_kind=r"\bA100\b.*40GB",
         device_bytes=42500000000, matrix_flops_per_second=271e12),
    _gpu("A100-80", 80, 2039, 312, 400, "GA100", "A100-80GB", "A100-80GB-SXM", "A100-SXM4-80GB", device_kind=r"\bA100\b",
         device_bytes=85100068864, matrix_flops_per_second=271e12),
    _gpu("H100-PCIe", 80, 2000, 756, 350, "GH100-PCIe", "H100-PCIE-80GB", device_kind=r"\bH100 PCIe\b"),
    _gpu("H100", 80, 3350, 989, 700, "GH100-SXM", "H100-SXM", "H100-80GB", "H100-80GB-HBM3", "H100-SXM5", device_kind=r"\bH100\b",
         device_bytes=84942979072, matrix_flops_per_second=794e12),
    _gpu("H200", 141, 4800, 989, 700, "GH100-SXM", "H200-SXM", "H200-141GB", device_kind=r"\bH200\b", device_bytes=151400000000,
         matrix_flops_per_second=785e12),
    _gpu("B200", 180, 8000, 2250, 1000, "GB100", "B200-SXM", device_kind=r"\bB200\b", matrix_flops_per_second=1745e12),
    _gpu("L4", 24, 300, 121, 72, "AD104", device_kind=r"\bL4\b", device_bytes=23609475072),
    _gpu("L40S", 48, 864, 362, 350, "AD102-L40S", device_kind=r"\bL40S\b"),
    _gpu("RTX-4090", 24, 1008, 165, 450, "AD102-4090", "RTX4090", "4090", "RTX 4090", device_kind=r"\bRTX 4090\b"),
    _gpu("A10G", 24, 600, 70, 300, "GA102-A10G", device_kind=r"\bA10G\b"),
    _gpu("V100-16", 16, 900, 125, 300, "GV100", "V100", "V100-16GB", device_kind=r"\bV100\b.*16GB", bf16=False),
    _gpu("V100-32", 32, 900, 125, 300, "GV100", "V100-32GB", device_kind=r"\bV100\b", bf16=False),
)  # fmt: skip

GPUS: dict[str, GPU] = {gpu.name: gpu for gpu in _TABLE}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia"))


def find(name: str, table: dict[str, GPU] | None = None) -> GPU:
    """The GPU of this name or alias, case and punctuation aside. Raises UserError with the nearest names for another."""
    table = GPUS if table is None else table
    names = {_plain(n): gpu for gpu in table.values() for n in (gpu.name, *gpu.aliases)}
    key = _plain(name)
    if key in names:
        return names[key]
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.4)
    nearest = list(dict.fromkeys(names[n].name for n in near))
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    raise UserError(f"unknown GPU {name!r}: {hint}Known: {', '.join(table)}; another one can be described in YAML (--gpu-file)")


def of_device_kind(device_kind: str) -> GPU | None:
    """The GPU that jax names so (e.g. "NVIDIA H100 80GB HBM3"), or None."""
    for gpu in GPUS.values():
        if gpu.device_kind and re.search(gpu.device_kind, device_kind):
            return gpu
    return None


_YAML_KEYS = {"memory_gb": True, "bandwidth_gb_per_second": True, "bf16_tflops": True, "watts": False, "chip": False, "source": False}


def from_yaml(path: str | Path) -> dict[str, GPU]:
    """The table with a user's own GPUs: `NAME: {memory_gb: 32, bandwidth_gb_per_second: 1790, bf16_tflops: 210}`.

    `watts`, `chip` and `source` are optional. Raises UserError for a file, key or value that cannot be meant.
    """
    import yaml

    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--gpu-file {path}: {getattr(error, 'strerror', None) or error}") from error
    example = "NAME: {memory_gb: 32, bandwidth_gb_per_second: 1790, bf16_tflops: 210}"
    if not isinstance(document, dict) or not all(isinstance(v, dict) for v in document.values()):
        raise UserError(f"--gpu-file {path}: expected lines like `{example}`")
    table = dict(GPUS)
    for name, figures in document.items():
        missing = [key for key, needed in _YAML_KEYS.items() if needed and key not in figures]
        unknown = [key for key in figures if key not in _YAML_KEYS]
        if missing or unknown:
            what = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(map(str, unknown))}"
            raise UserError(f"--gpu-file {path}: {name} {what}; expected `{example}`")
        for key in ("memory_gb", "bandwidth_gb_per_second", "bf16_tflops", "watts"):
            value = figures.get(key)
            if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool) and value > 0):
                raise UserError(f"--gpu-file {path}: {name}.{key} = {value!r}: expected a number above 0")
        gpu = _gpu(str(name), figures["memory_gb"], figures["bandwidth_gb_per_second"], figures["bf16_tflops"],
                   figures.get("watts"), str(figures.get("chip", name)))  # fmt: skip
        table[str(name)] = dataclasses.replace(gpu, source=str(figures.get("source", path.name)))
    return table
