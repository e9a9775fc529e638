"""The first twenty minutes on a card: is this machine in order, are the numbers right, what do the real steps take and where does it go?
Then: which kernels are fastest here, larger steps and other models, PyTorch on the same card, receipts, and every bar with what was
reached.

    make gpu-acceptance PYTHON=python3                     # no virtual environment, no network, nothing is installed
    python benchmarks/gpu_acceptance.py [--out FILE] [--minutes 8] [--more-minutes 12] [--tiny]

Two parts, each with its minutes (`--more-minutes 0`: the first alone) and the most valuable step first; each result is written at once, and
a second call does only what is missing (of the same commit, device and versions). Each step is a process of its own with a time limit, so
that none takes the others with it. It needs jax with its CUDA plugin, flax, optax, safetensors, tokenizers and PyYAML, as images for JAX
have them, and pydantic: what is missing is named first, with the command that fetches it. `--tiny` does all of it with small models, on a
CPU too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bars
import kept

from moejax import installation

# Module: the wheels that bring it, where pip would have no network to find what they need.
NEEDED = {
    "jax": "jax", "flax": "flax", "optax": "optax", "safetensors": "safetensors", "ml_dtypes": "ml_dtypes", "numpy": "numpy",
    "google.protobuf": "protobuf", "yaml": "PyYAML", "tokenizers": "tokenizers", "rich": "rich markdown-it-py mdurl pygments",
    "pydantic": "pydantic pydantic-core annotated-types typing-inspection typing-extensions",
}  # fmt: skip
LEAST_SECONDS = 20.0  # a step that has less left is not begun
REFERENCE = ROOT / ".venv-reference4" / "bin" / "python"
"""PyTorch's environment, where somebody made it."""
PYTORCH = "PyTorch on the same card"
TINY = {
    "mixtral": "mixtral-tiny", "blackmamba": "blackmamba-tiny", "qwen3": "qwen3-moe-tiny", "gpt": "gpt-oss-tiny",
}  # fmt: skip
"""First word of a config's name -> the family's small model."""
RECIPE = (
    "adapter.targets=[q_proj,k_proj,v_proj,o_proj,w1,w2,w3]", "training.gradient_accumulation=4", "training.optimizer=adamw_8bit",
    "training.remat=full",
)  # fmt: skip
"""What other tools published receipts of: rank 16 on attention and experts, four micro-batches, 8-bit moments."""


class Step(NamedTuple):
    """arguments: of Python; seconds: its time limit; part: 1 or 2."""

    arguments: list[str]
    seconds: float
    part: int = 1


def steps(tiny: bool) -> dict[str, Step]:
    """By name, the most valuable of each part first."""

    def step(case: str, config: str, *more: str) -> list[str]:
        k = case.partition(":")[2]
        cases, small = (f"2x32:{min(int(k), 2)}", [f"model.preset={TINY[config.split('_')[0]]}"]) if tiny else (case, [])
        return ["benchmarks/step.py", "--config", f"configs/{config}.yaml", "--cases", cases, "--steps", "3", *more, *small]

    mixtral, blackmamba = "mixtral_8x7b_cs_sparse", "blackmamba_2.8b_cs_sparse"
    kernel, decode = ([], []) if tiny else (["model.scan=kernel"], ["model.moe_backend=decode"])  # a CPU has none
    torch = ["--seq-len", "32", "--rows", "2", "--most-rows", "2", "--tiny"] if tiny else ["--seq-len", "512", "--most-rows", "8"]
    return {
        "doctor": Step(["benchmarks/gpu_acceptance.py", "--doctor"], 60),
        "numbers": Step(["benchmarks/gpu_parity.py"], 180),
        "mixtral 8x512": Step(step("8x512:2", mixtral), 180),
        "mixtral 1x128": Step(step("1x128:2", mixtral), 120),
        "blackmamba 16x512": Step(step("16x512:2", blackmamba), 180),
        "mixtral 8x512 traced": Step(step("8x512:2", mixtral, "--trace"), 240),
        "mixtral 8x512 by blocks: an equal loss": Step(step("8x512:2", mixtral, "model.attention=blocks"), 180),
        "tune": Step(["benchmarks/gpu_acceptance.py", "--tune", *(["--tiny"] if tiny else [])], 220, 2),
        "mixtral 8x512 as tuned": Step(step("8x512:2", mixtral, "--tuned"), 120, 2),
        "blackmamba 16x512, the scan's kernel": Step(step("16x512:2", blackmamba, *kernel), 150, 2),
        "mixtral 1x128, decode": Step(step("1x128:2", mixtral, *decode), 100, 2),
        "mixtral 24x2048": Step(step("24x2048:2", mixtral), 150, 2),
        "qwen3 2x2048": Step(step("2x2048:8", "qwen3_30b_a3b_48gb", "training.remat=full"), 150, 2),
        "gpt-oss 1x2048": Step(step("1x2048:4", "gpt_oss_20b_24gb"), 150, 2),
        "mixtral r16, 4 of 2x704": Step(step("2x704:2", "mixtral_8x7b", *RECIPE), 150, 2),
        PYTORCH: Step(["benchmarks/step_times.py", "--cases", "Mixtral-8x7B, NF4, k = 2", "--steps", "3", *torch], 300, 2),
    }


def missing() -> list[str]:
    """Modules that this Python has not."""

    def there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # of the package that the module would lie in
            return False

    return [name for name in NEEDED if not there(name)]


def what_to_carry(absent: list[str]) -> str:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    wheels = " ".join(NEEDED[name] for name in absent)
    return (
        f"error: {sys.executable} (Python {python}) lacks {', '.join(absent)}. With a network: {sys.executable} -m pip install "
        f"{' '.join(NEEDED[name].split()[0] for name in absent)}. Without: carry the wheels there,\n"
        f"  pip download --only-binary=:all: --no-deps --python-version {python} --dest wheels {wheels}\n"
        f"  {sys.executable} -m pip install --no-index --find-links wheels {wheels}"
    )


def doctor() -> dict[str, Any]:
    """The findings of `moejax doctor` but for the Hub's, what jax and the driver say of the device."""
    import jax

    from moejax.commands import doctor

    findings = [*doctor.versions(), *doctor.devices(), *doctor.memory(), *doctor.caches()]
    device = jax.local_devices()[0]
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        smi = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        smi = None
    return {
        "device": device.device_kind, "platform": device.platform, "compute_capability": getattr(device, "compute_capability", None),
        "memory_stats": device.memory_stats(), "nvidia_smi": smi, "findings": [f._asdict() for f in findings],
    }  # fmt: skip


def tuned(tiny: bool) -> dict[str, Any]:
    """The quick form of `moejax tune` at 8 rows of 512 tokens; its choices are stored for this machine."""
    from moejax import config
    from moejax.runtime import prepare_jax
    from moejax.tuner import run, use

    sizes = [*kept.of_rows(2, 32), f"model.preset={TINY['mixtral']}"] if tiny else kept.of_rows(8, 512)
    experiment = config.load(ROOT / "configs" / "mixtral_8x7b_cs_sparse.yaml", [*kept.RANDOM, *sizes])
    prepare_jax(experiment.device)
    sites = use.measure(experiment, full=False, anew=True)
    return {"sites": sites, "gains": run.gains(sites)}


def run(arguments: list[str], seconds: float, why: str = "") -> dict[str, Any]:
    """One step in a process of its own: its report, or what became of it. why: it is stopped after this many seconds.

    All is compiled again: compiling is timed, and of a program that comes from a cache on disk a trace says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "out.json", time.perf_counter()
        command = [sys.executable, *arguments, "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "JAX_COMPILATION_CACHE_DIR": ""}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
            )
            code, said = done.returncode, (done.stderr or done.stdout).strip()
        except subprocess.TimeoutExpired:
            code, said = -1, f"stopped after {seconds:.0f} s{why}"
        result = {"seconds": round(time.perf_counter() - start, 1), "command": " ".join(["python", *arguments]), "exit": code}
        if out.exists():
            result["report"] = json.loads(out.read_text())
        return result if code == 0 else result | {"said": said[-1500:]}


def told(name: str, result: dict[str, Any]) -> str:
    """What there is to see of a step, in one line."""
    report = result.get("report") or {}
    parts = [f"{name}: {'done' if result['exit'] == 0 else 'NOT RIGHT'}, {result['seconds']} s"]
    if "checks" in report:
        bad = [f"{c['check']} {c['difference']:.3g}" for c in report["checks"] if not c["ok"]]
        parts.append(f"{len(report['checks']) - len(bad)} of {len(report['checks'])} checks" + (f"; not: {', '.join(bad)}" if bad else ""))
    parts += report.get("gains", [])
    if isinstance(cases := report.get("cases", []), dict):  # of both frameworks
        for case in cases.values():
            parts += [f"moejax is {times:.2f} times as fast ({batch})" for batch, times in case["times_as_fast"].items()]
            parts += [f"{side}: {cell['error']}" for side, cell in case["same batch"].items() if "error" in cell]
        cases = []
    for case in cases:
        if "error" in case:
            parts.append(case["error"])
            continue
        peaks = [case["compiler_peak_bytes"], case.get("device_peak_bytes")]  # a CPU's allocator does not say
        compiler, measured = ("unknown" if peak is None else f"{peak / 1e9:.2f} GB" for peak in peaks)
        parts.append(
            f"{1e3 * case['median']:.1f} ms a step, {case['tokens_per_second']:,.0f} tokens/s, "
            f"{100 * case['model_flop_utilization']:.1f} % of the peak, compiled in {case['compile_seconds']:.0f} s; peak "
            f"{compiler} by the compiler, {measured} by the allocator"
        )
        if "trace" in case:
            longest = list(case["trace"]["stages"].items())[:6]
            parts.append(", ".join(f"{stage} {1e3 * seconds:.1f} ms" for stage, seconds in longest))
            parts.append(f"{100 * case['trace']['attributed']:.1f} % under a name")
    if result["exit"] != 0 and all(c["ok"] for c in report.get("checks", [])):
        parts.append(result["said"].splitlines()[-1] if result["said"] else f"exit {result['exit']}")
    return "; ".join(parts)


def receipts_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every step that was timed, the first with a recipe."""
    found: dict[str, dict[str, Any]] = {}
    for step in report["steps"].values():
        cases = (step.get("report") or {}).get("cases", [])
        for case in cases if isinstance(cases, list) else ():
            if "receipt" in case and "trace" not in case:
                found.setdefault(f"{case['receipt']['id']} {case['receipt']['engagement']}", case["receipt"])
    return [receipt | {"id": f"{receipt['id']}-{number}"} for number, receipt in enumerate(found.values(), 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-gpu-acceptance.json")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the first part (8); with more, each step may take longer")
    parser.add_argument("--more-minutes", type=float, default=12.0, help="of the second part (12); 0: none")
    parser.add_argument("--tiny", action="store_true", help="small models: a rehearsal")
    parser.add_argument("--doctor", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tune", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    absent = missing()
    if absent:
        print(what_to_carry(absent), file=sys.stderr)
        return 2
    if options.doctor:
        found = doctor()
        kept.write(options.out, found)
        return int(any(f["status"] == "error" and f["what"] != "packages" for f in found["findings"]))
    if options.tune:
        kept.write(options.out, tuned(options.tiny))
        return 0
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    platform, kind = kept.device()
    about = {"device": kind, "platform": platform, "versions": installation.versions(), "commit": git or None, "tiny": options.tiny}
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    same = all(known.get(key) == value for key, value in about.items())
    report = kept.about(steps=known["steps"] if same else {}) | about
    if platform == "cpu" and not options.tiny:
        print("error: jax sees no GPU here: `moejax doctor`, BUILD.md. --tiny rehearses on a CPU", file=sys.stderr)
        return 2
    if known and not same:  # of another device, commit or version: kept next to
        kept_at = next(p for n in range(1, 1000) if not (p := options.out.with_suffix(f".{n}.json")).exists())
        options.out.rename(kept_at)
        print(f"{kept_at}: what was there (device, commit or versions differ)", flush=True)
    asked = [name for name, step in steps(options.tiny).items() if step.part == 1 or options.more_minutes > 0]
    if PYTORCH in asked and not REFERENCE.exists():
        asked.remove(PYTORCH)
        print(f"{PYTORCH}: not here (`make reference4`, with PyTorch's CUDA build, makes its environment)", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        if options.tiny:  # what is tuned for a rehearsal is of no use to a run
            os.environ["MOEJAX_CACHE"] = cache
        for part, minutes, usual in ((1, options.minutes, 8.0), (2, options.more_minutes, 12.0)):
            rest = {name: step for name, step in steps(options.tiny).items() if step.part == part and name in asked}
            part_of(rest, minutes, minutes / usual, report, options)
    if receipts := receipts_of(report):
        kept.write(options.out.with_name(f"{options.out.stem}-receipts.json"), {"about": kept.about(**about), "receipts": receipts})
    print(f"\n{bars.table(list(bars.lines(bars.compiled(bars.newest('bars')), {} if options.tiny else report)))}\n\n{options.out}")
    return int(any(name not in report["steps"] or report["steps"][name]["exit"] for name in asked))


def part_of(rest: dict[str, Step], minutes: float, longer: float, report: dict[str, Any], options: argparse.Namespace) -> None:
    """These steps, as far as the minutes go; each into the report, which is written. longer: than usual, a step may take."""
    end = time.monotonic() + 60 * minutes
    for name, step in rest.items():
        before = report["steps"].get(name)
        if before is not None and before["exit"] == 0:
            print(f"{told(name, before)} (from before)", flush=True)
            continue
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"{name}: no time left; the same command does it", flush=True)
            continue
        limit = left if options.tiny else step.seconds * max(1.0, longer)  # of a CPU nobody knows how long it takes
        why = "" if limit < left else f", as {minutes:g} min were over: the same command does it"
        report["steps"][name] = run(step.arguments, min(limit, left), why)
        kept.write(options.out, report)
        print(told(name, report["steps"][name]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
