"""`moejax doctor`: check this machine and its installation, and suggest fixes."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from moejax import __version__, installation, libtpu
from moejax.device import host_bytes
from moejax.files import cache_folder, nearest
from moejax.installation import version
from moejax.terminal import Console

HUB_SECONDS = 3.0
LOW_DISK_BYTES = 20e9


class Finding(NamedTuple):
    """One line: ok, a note (something works less well), or an error (a run will fail)."""

    what: str
    status: str  # "ok", "note", "error"
    found: str
    advice: str = ""


def add_arguments(_: argparse.ArgumentParser) -> None:
    """None."""


def run(_: argparse.Namespace) -> int:
    """Print the table. Returns 1 if something would make every run fail, else 0."""
    findings = [*versions(), *tpu(), *devices(), *memory(), *plugin(), *caches(), hub()]
    table = Table(title=f"moejax {__version__}", title_justify="left")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "note": "yellow", "error": "red"}
    for f in findings:
        table.add_row(Text(f.status, colours[f.status]), f.what, f.found, f.advice)
    Console(160).print(table)
    return int(any(f.status == "error" for f in findings))


def versions() -> Iterable[Finding]:
    """Python and the packages that are needed."""
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding("Python", "ok" if fits else "error", platform.python_version(), "" if fits else "use Python 3.11 to 3.13")
    found = {name: version(name) for name in ("jaxlib", *map(installation.name_of, installation.requirements()))}
    missing = [name for name, installed in found.items() if installed is None]
    text = ", ".join(f"{name} {installed}" for name, installed in found.items() if installed is not None)
    advice = f"lacking: {', '.join(missing)}. {installation.for_packages(missing)}" if missing else ""
    yield Finding("packages", "error" if missing else "ok", text, advice)
    for extra in ("cuda12", "cuda13"):
        plugin = f"jax-{extra}-plugin"
        if (installed := version(plugin)) not in (None, found["jaxlib"]):
            remedy = f"its version must be jaxlib's: {installation.for_extra(extra)}"
            yield Finding("CUDA plugin", "error", f"{plugin} {installed}", remedy)


def tpu() -> Iterable[Finding]:
    """The TPU's library: of a machine that has one, and of one that compiles for it."""
    chips, wrong = libtpu.here(), libtpu.problem()
    if chips is not None:
        found = f"{chips}; {wrong}" if wrong else f"{chips}, libtpu {version('libtpu')}"
        yield Finding("TPU", "error" if wrong else "ok", found, installation.for_extra("tpu") if wrong else "")
    elif wrong is not None and version("libtpu") is not None:
        yield Finding("libtpu", "note", wrong, f"it compiles for TPUs in this version: {installation.for_extra('aot-tpu')}")


def devices() -> Iterable[Finding]:
    """What jax computes on; a GPU that it does not see."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # looking must not take the memory of a run next to it
    try:
        import jax

        found = jax.devices()
    except (ImportError, RuntimeError) as error:
        advice = f"JAX_PLATFORMS=cpu runs without a GPU; with one: {gpu_install()}"
        yield Finding("devices", "error", str(error).splitlines()[0][:200], advice)
        return
    kinds = ", ".join(sorted({f"{d.device_kind} ({d.platform})" for d in found}))
    status, advice = "ok", ""
    if len(found) > 1 and found[0].platform == "tpu":
        status, advice = "note", f"a config without mesh uses one chip: mesh.devices={len(found)} mesh.weights=spread (docs/tpu.md)"
    elif len(found) > 1 and found[0].platform != "cpu":
        status, advice = "note", "a config without mesh uses the first: choose it with CUDA_VISIBLE_DEVICES, or set mesh"
    elif found[0].platform == "cpu" and has_nvidia():
        status, advice = "note", f"the NVIDIA driver is there, but jax runs on the CPU: {gpu_install()}"
    elif found[0].platform == "cpu":
        advice = "no GPU: the demos and tests run; a 7B model does not"
    yield Finding("devices", status, f"{len(found)} of {kinds}", advice)


def gpu_install() -> str:
    return f"{installation.for_extra('cuda12')} (or cuda13)"


def has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def memory() -> Iterable[Finding]:
    """Bytes of the device and of the host."""
    try:
        import jax

        stats = jax.local_devices()[0].memory_stats()
    except (ImportError, RuntimeError):
        stats = None
    if stats and "bytes_limit" in stats:
        used, limit = stats.get("bytes_in_use", 0), stats["bytes_limit"]
        text = f"{limit / 1e9:.1f} GB for jax, {used / 1e9:.1f} in use"
        yield Finding("device memory", "ok", text, "device.memory_fraction sets the share")
    if host := host_bytes():
        total, free = host
        low = free < 4e9
        advice = "less than 4 GB: end other programs, or expect the system to end the run" if low else ""
        yield Finding("host memory", "note" if low else "ok", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB available", advice)


def plugin() -> Iterable[Finding]:
    """TensorBoard's Profile tab."""
    what = "TensorBoard's Profile tab"
    if installed := version("xprof"):
        yield Finding(what, "ok", f"xprof {installed}")
    else:
        advice = f"{installation.for_extra('profile')} for the traces in TensorBoard; moejax breakdown works without"
        yield Finding(what, "note", "no xprof", advice)


def caches() -> Iterable[Finding]:
    """The folders that are written to: there, writable, with room."""
    hub_home = os.environ.get("HF_HOME", str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"))
    for what, name, remedy in (
        ("compiled programs", os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/moejax/xla", "device.compilation_cache=DIR"),
        ("quantized weights", "~/.cache/moejax/quantized", "quantization.cache=DIR"),
        ("compiled memory figures", str(cache_folder()), "MOEJAX_CACHE=DIR"),
        ("Hub downloads", os.environ.get("HF_HUB_CACHE") or f"{hub_home}/hub", "HF_HOME=DIR"),
        ("runs", "runs", "runs_dir=DIR"),
    ):
        yield folder_finding(what, Path(name).expanduser(), remedy)


def folder_finding(what: str, folder: Path, remedy: str) -> Finding:
    """Whether `folder`, or the nearest folder above it that exists, can be written to, and its free space."""
    there = nearest(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding(what, "error", f"{folder}: {there} cannot be written to", f"choose another folder: {remedy}")
    free = shutil.disk_usage(there).free
    text = f"{folder}{'' if folder.exists() else ' (not there yet)'}, {free / 1e9:.0f} GB free"
    low = free < LOW_DISK_BYTES
    advice = f"little room (Mixtral-8x7B is 93 GB, with model.download=stream 30): {remedy} on another disk" if low else ""
    return Finding(what, "note" if low else "ok", text, advice)


def hub() -> Finding:
    """Whether the Hub answers."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("Hub", "note", "HF_HUB_OFFLINE is set: only what is cached is found", "unset it to download")
    token = "a token is set" if os.environ.get("HF_TOKEN") else "no HF_TOKEN (gated models need one)"
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError as error:  # it answered
        return Finding("Hub", "ok" if error.code < 500 else "note", f"{endpoint} answers {error.code}, {token}")
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))[:150]
        advice = "give folders for model.source, tokenizer and data.source; behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT"
        return Finding("Hub", "note", f"{endpoint} cannot be reached ({reason})", advice)
    return Finding("Hub", "ok", f"{endpoint} answers, {token}")
