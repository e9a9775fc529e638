"""Traced steps: torch.profiler around them, and step_profile.json from their trace, as moejax/profiling/schema.py fixes it."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import contract
import torch
import tracing
from torch.profiler import ProfilerActivity, profile

from moejax.device import cpu_name
from moejax.profiling import torch_trace
from moejax.profiling import traced as of_steps

TRACE = "trace.json.gz"


def start(device: str) -> Any:
    """A running profiler, scopes switched on."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    tracer = profile(activities=activities)
    tracing.switch(True)
    tracer.start()
    return tracer


def stop(tracer: Any, path: Path) -> None:
    tracer.stop()
    tracing.switch(False)
    tracer.export_chrome_trace(str(path))


def write(trainer: Any, records: list[dict[str, Any]], first: int, last: int, out: Path) -> None:
    """out/step_profile.json of the traced steps `first` to `last`."""
    found = torch_trace.analyze(torch_trace.read(out / TRACE))
    content, e = trainer.content, trainer.content["experiment"]
    traced = [r | {"shape": trainer.batch(r["step"] - 1)["tokens"].shape} for r in records if first <= r["step"] <= last]
    # The first step warms up, and the one after the trace waits for its file.
    free = [r["step_seconds"] for r in records[1:] if not first <= r["step"] <= last + 1]
    model = content["model"]
    adapter, quantized = e["adapter"] is not None, e["quantization"]["format"] != "none"
    peak, bandwidth = peaks(trainer.options.device, e["training"]["compute_dtype"])
    memory = next(iter(trainer.memory().values()))
    profile_ = {
        "schema_version": 2,
        "framework": "pytorch",
        "versions": {"python": platform.python_version(), "torch": torch.__version__} | trainer.side.versions,
        "device": {
            "name": device_name(trainer.options.device),
            "memory_bytes": memory_bytes(trainer.options.device),
            "peak_flops": peak,
            "peak_bytes_per_second": bandwidth,
            "peaks_measured": True,
        },
        "model": {name: model[name] for name in ("name", "params_total", "params_active")}
        | {"params_trainable": sum(p.numel() for p in trainer.side.trainable)},
        "method": "full" if not adapter else "qlora" if quantized else "lora",
        "precision": e["training"]["compute_dtype"],
        "remat": e["training"]["remat"],
        "moe": {"experts": model["experts"], "top_k": model["experts_per_token"], "backend": trainer.side.backend},
        "batch": of_steps.batch(e["data"]["batching"], traced),
        "step_seconds": of_steps.step_seconds(free),
        "compile_seconds": None,
        "memory": {
            "compiler_peak_bytes": None,
            "measured_peak_bytes": memory,
            "arguments_bytes": None,
            "temporaries_bytes": None,
        },
        "phases": {"collectives": 0.0} | found.phases,
        "layers": found.layers,
        "moe_kernels": found.moe_kernels,
        "cost": None,
        "expert_load": of_steps.expert_load(traced, contract.architecture(content).expert_layer_numbers),
        "devices": 1,
        "mode": None,
        "collectives": {},
    }
    (out / "step_profile.json").write_text(json.dumps(profile_, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{100 * found.attributed:.1f} % of a traced step is under a named stage")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def memory_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peaks(device: str, dtype: str) -> tuple[float, float]:
    """FLOP/s of a square product and bytes/s of a copy, as reached here: the best of five each."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    source = torch.randn(64 * 2**20, device=device)
    target = torch.empty_like(source)

    def best(work: Any) -> float:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)

    return 2 * n**3 / best(lambda: a @ a), 2 * source.numel() * 4 / best(lambda: target.copy_(source))
