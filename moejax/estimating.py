"""`estimate.py memory | fit | compare`: what needs a compiler or a run's files. It reads and compiles; `estimator/` gets plain figures.

jax is imported by `memory` alone, through training/aot.py, and only where something is to be compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax import installation
from moejax.documents import read_json
from moejax.errors import UserError
from moejax.estimator.asked import HERE, names_of
from moejax.estimator.gpus import GPU, GPUS, platform_of_capability

if TYPE_CHECKING:
    from moejax.config import Experiment
    from moejax.estimator.closed_form import Breakdown
    from moejax.estimator.fitting import Run
    from moejax.estimator.memory import Largest, Peak
    from moejax.models.config import Architecture

COMMANDS = ("memory", "fit", "compare")


def add_arguments(commands: Any) -> None:
    """The three commands and their options."""
    memory = commands.add_parser("memory", help="the largest batch that fits, the peak and what it is made of, by the compiler")
    memory.add_argument("--config", metavar="FILE", help="experiment in YAML (`moejax init` writes one)")
    memory.add_argument("--gpu", default="A40,A100-80,H100", metavar="NAME[,NAME]", help=f"GPUs by name, or `{HERE}`: this machine")
    memory.add_argument("--gpu-file", metavar="FILE", help="your own GPUs in YAML")
    memory.add_argument("--seq-len", type=int, metavar="TOKENS", help="of a row; by default the config's longest")
    memory.add_argument("--rows", type=int, metavar="N", help="only so many rows: peak and breakdown; by default the largest that fits")
    memory.add_argument("--closed-form", action="store_true", help="do not compile: by arithmetic (also without the extra `aot`)")
    memory.add_argument("--study", action="store_true", help="the study's Table III beside ours on 40, 48 and 80 GB (without --config)")
    memory.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change single values of the config")
    fit = commands.add_parser("fit", help="coefficients.json from the step_profile.json of several runs of one model")
    fit.add_argument("runs", nargs="+", metavar="RUN", help="a profiled run's folder, or a step_profile.json")
    fit.add_argument("--out", default="coefficients.json", metavar="FILE", help="where the coefficients go (default: coefficients.json)")
    compare = commands.add_parser("compare", help="predicted against measured for a finished run; kept in its comparison.json")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="a finished run's folder, e.g. runs/demo")
    compare.add_argument("--coefficients", metavar="FILE", help="of this model and device; by default those that the run was told")
    for command in (memory, fit, compare):
        command.add_argument("--json", action="store_true", help="print JSON and nothing else")
    fit.add_argument("--plot", metavar="DIR", help="draw the residuals (PNG) into this folder")


def run(options: argparse.Namespace) -> int:
    """Run a command; mistakes of the user's are raised as UserError."""
    return {"memory": _memory, "fit": _fit, "compare": _compare}[options.estimate_command](options)


def architecture_of(experiment: Experiment) -> Architecture:
    """The sizes of a config's model: of its folder where it is one, else of its preset; nothing is fetched."""
    from moejax.models.config import from_hub_config

    source = experiment.model.source
    file = Path(source or "", "config.json")
    content = read_json(file) if source and file.is_file() else None
    try:
        base = None if content is None else from_hub_config(content, experiment.model.ignored_settings)
        return experiment.model.architecture(base)
    except (ValueError, KeyError) as error:
        raise UserError(f"model: {error}") from None


def versions() -> dict[str, str]:
    """Of what compiles."""
    found = {}
    for name in ("jax", "jaxlib", "flax", "optax", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cuda-nvcc-cu12"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _sources() -> str:
    """Hash of everything that the step is made of: sources, and the tables that choose what is compiled."""
    from moejax.estimator.memory import digest

    training = [installation.PACKAGE / "training" / f"{name}.py" for name in ("aot", "optimizer", "state", "step")]
    models = [path for path in (installation.PACKAGE / "models").rglob("*") if path.suffix in (".py", ".json")]
    return digest([*models, *training])


def why_not_compiled(gpu: GPU) -> str | None:
    """Why no compiler can answer for this GPU here; None where one can."""
    if gpu.usable_bytes is not None:
        return None
    if all(importlib.util.find_spec(f"jax_cuda{n}_plugin") is None for n in (12, 13)):
        return f"the extra `aot` is missing ({installation.for_extra('aot')})"
    from moejax.estimator.targets import MULTIPROCESSORS, target_of

    if target_of(gpu) is not None:
        return None
    if gpu.compiler is not None:
        return f"{gpu.name}: compute capability {gpu.compiler.compute_capability} is none of {', '.join(MULTIPROCESSORS)}"
    return f"{gpu.name}: --gpu-file says no compute_capability, multiprocessors, l2_mb, clock_ghz"


@dataclass
class Oracle:
    """Peaks of one experiment's step on one GPU: compiled and kept, or, with a `reason`, by the closed form."""

    experiment: Experiment
    config: Architecture
    gpu: GPU
    row_tokens: int
    reason: str | None
    hits: int = 0
    misses: int = 0
    known: dict[int, Peak] = field(default_factory=dict)

    def breakdown(self, rows: int, gpu: GPU | None = None, *, float32: bool = False) -> Breakdown:
        """The closed form on this GPU, or on another; in fp32 throughout, where that is asked."""
        from moejax.estimator import closed_form

        gpu, experiment = gpu or self.gpu, self.experiment
        if float32:
            training = experiment.training.model_copy(update={"compute_dtype": "float32", "param_dtype": "float32"})
            experiment = experiment.model_copy(update={"training": training})
        platform = closed_form.platform_of(gpu)
        if gpu.usable_bytes is None:
            device = closed_form.device_of(gpu)
        else:
            from moejax.models.ops.grouped_choice import here

            device = here()
        return closed_form.breakdown(experiment, self.config, rows=rows, row_tokens=self.row_tokens, platform=platform, device=device)

    def peak_bytes(self, rows: int) -> int:
        if self.reason is not None:
            return self.breakdown(rows).total
        if rows not in self.known:
            self.known[rows] = self._compiled(rows)
        return self.known[rows].peak_bytes

    def _compiled(self, rows: int) -> Peak:
        from moejax.estimator import memory
        from moejax.estimator.targets import target_of
        from moejax.training import aot

        gpu = None if self.gpu.usable_bytes is not None else target_of(self.gpu)
        target: Any = aot.machine() if gpu is None else dataclasses.asdict(gpu)
        key = {
            "experiment": memory.relevant(self.experiment), "architecture": [type(self.config).__name__, dataclasses.asdict(self.config)],
            "versions": versions(), "sources": _sources(), "target": target, "rows": rows, "row_tokens": self.row_tokens,
        }  # fmt: skip

        def compile_it() -> Peak:
            c = aot.compile_step(self.experiment, self.config, rows=rows, row_tokens=self.row_tokens, gpu=gpu)
            return memory.Peak(c.peak_bytes, c.argument_bytes, c.temporary_bytes, c.compile_seconds)

        peak, there = memory.cached(key, compile_it)
        self.hits, self.misses = self.hits + there, self.misses + (not there)
        return peak

    def largest(self, limit: float, ratio: float = 1.0) -> Largest:
        """The largest number of rows within `limit` bytes; the closed form times `ratio` says where to begin. Where the closed form
        itself answers, its error is allowed for."""
        from moejax.estimator import memory

        if self.reason is not None:
            return memory.largest_rows(self.peak_bytes, memory.by_closed_form(limit)[0])
        guess = max(1, memory.largest_rows(lambda rows: int(ratio * self.breakdown(rows).total), limit).rows)
        slope = self.breakdown(guess + 1).total - self.breakdown(guess).total
        return memory.largest_rows(self.peak_bytes, limit, guess, slope)


def quiet_compiler(gpus: str) -> None:
    """Before jax is imported: none of XLA's remarks about a driver that is not there, and no device but where one is asked."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if HERE not in gpus.split(","):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _memory(options: argparse.Namespace) -> int:
    from moejax.estimator import memory_report

    quiet_compiler(options.gpu)
    if not options.config:
        raise UserError("which experiment? --config FILE (`moejax init` writes one), or --study")
    from moejax import config
    from moejax.estimator import gpus

    for name in ("seq_len", "rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    experiment = config.load(options.config, options.overrides)
    if experiment.training.remat == "auto":  # the largest batch is that of the policy that keeps least
        experiment = config.load(options.config, [*options.overrides, "training.remat=full"])
        if not options.json:
            print("training.remat = auto: counted as full, which the largest batch needs; with room left a run recomputes less")
    architecture = architecture_of(experiment)
    row_tokens = options.seq_len or experiment.data.longest_text
    if row_tokens > architecture.max_position_embeddings:
        raise UserError(f"rows of {row_tokens} tokens exceed the model's max_position_embeddings = {architecture.max_position_embeddings}")
    row_tokens = config.whole_row(row_tokens)
    table = gpus.from_yaml(options.gpu_file) if options.gpu_file else gpus.GPUS
    asked = dict.fromkeys(HERE if name == HERE else gpus.find(name, table) for name in names_of(options.gpu))
    found = []
    for card in asked:
        gpu = this_machine(experiment.device.memory_fraction) if isinstance(card, str) else card
        found.append((gpu, oracle(experiment, architecture, gpu, row_tokens, options.closed_form)))
    padded = options.seq_len is not None or experiment.data.batching != "pack"
    return memory_report.table(experiment, found, table, rows=options.rows, padded=padded, as_json=options.json)


def oracle(experiment: Experiment, architecture: Architecture, gpu: GPU, row_tokens: int, closed: bool) -> Oracle:
    """Who answers for one experiment on one GPU: the compiler, or the closed form with the reason."""
    reason = "--closed-form was given" if closed else why_not_compiled(gpu)
    return Oracle(experiment, architecture, gpu, row_tokens, reason)


def this_machine(fraction: float) -> GPU:
    """This machine's device: its card of the table where it is one, else with nothing but its name; with what jax may use of its memory,
    at this share. Raises UserError where that is not known."""
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(fraction))  # before jax is imported
    import jax

    from moejax.estimator.fitting import gpu_name
    from moejax.training import memory
    from moejax.training.step_profile import cpu_name

    device, usable = jax.local_devices()[0], memory.usable_bytes()
    if usable is None:
        raise UserError(f"--gpu {HERE}: this machine does not say how much memory it has; give a GPU's name")
    if device.platform == "cpu":
        return GPU(cpu_name(), usable / 1e9, 1.0, 1.0, None, "cpu", usable_bytes=usable, platform="cpu", source="this machine")
    known = GPUS.get(gpu_name(device.device_kind))
    if known is not None:
        return dataclasses.replace(known, usable_bytes=usable)
    capability = str(getattr(device, "compute_capability", ""))
    platform = platform_of_capability(capability)
    return GPU(device.device_kind, usable / 1e9, 1.0, 1.0, None, HERE, usable_bytes=usable, platform=platform, source="this machine",
               bf16=not capability[:1].isdigit() or float(capability) >= 8)  # fmt: skip


def this_machine_timed(own: bool) -> GPU:
    """The same for a prediction of time: a device of no table has its peaks measured. `own`: there are coefficients of the user's.

    Raises UserError for a CPU without them: the study's are of GPUs.
    """
    from moejax.config import DeviceConfig

    gpu = this_machine(DeviceConfig().memory_fraction)
    if gpu.platform == "cpu" and not own:
        raise UserError(
            f"--gpu {HERE}: this machine has a CPU only ({gpu.name}), and the study's times are of GPUs: profile your own runs here "
            "(moejax profile CONFIG, moejax estimate fit RUN…, then --coefficients FILE), or name a GPU; `memory --gpu here` says what fits"
        )
    if gpu.source != "this machine":
        return gpu
    from moejax.training import flops

    (peak, _), (rate, _) = flops.peak_flops("float32" if gpu.platform == "cpu" else "bfloat16"), flops.peak_bytes_per_second()
    return dataclasses.replace(gpu, flops_per_second=peak, bytes_per_second=rate, source="measured here")


def _fit(options: argparse.Namespace) -> int:
    from moejax.estimator import coefficients, run_report
    from moejax.estimator.fitting import fit_runs

    fitted = fit_runs([measured(Path(path)) for path in options.runs])
    paper = {f.entry.gpu: {"equation_1": f.equation_1, "equation_2": f.equation_2} for f in fitted}
    coefficients.write(options.out, [f.entry for f in fitted], paper)
    return run_report.fitted(fitted, options.out, as_json=options.json, plot=options.plot)


def measured(path: Path) -> Run:
    """A run's step_profile.json as plain figures. Raises UserError for one that is missing, or says too little."""
    from moejax.estimator.fitting import Run
    from moejax.profiling import schema

    p = schema.read(path)
    needed = {"step_seconds.median": p.step_seconds.median, "batch.queries": p.batch.queries, "batch.tokens": p.batch.tokens}
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} is null or 0: nothing can be fitted to this run; profile it again")
    peak = p.memory.compiler_peak_bytes or p.memory.measured_peak_bytes
    return Run(
        str(path), p.framework, p.device.name, p.model.name, p.model.params_total, p.method, p.moe.experts, p.moe.top_k,
        float(p.batch.queries or 0), float(p.batch.tokens or 0), float(p.step_seconds.median or 0), peak, p.memory.arguments_bytes,
        p.precision, p.remat, round(p.batch.row_tokens or 0) or None,
    )  # fmt: skip


def _compare(options: argparse.Namespace) -> int:
    from moejax.estimator import coefficients, comparison, run_report

    entries = coefficients.read(options.coefficients) if options.coefficients else ()
    found = {}
    for path in options.runs:
        told = comparison.read_prediction(Path(path))
        entry = None
        if options.coefficients:
            key = told["model"], told["method"], told["gpu"]
            entry = next((e for e in entries if (e.model, e.method, e.gpu) == key), None)
            if entry is None:
                raise UserError(f"--coefficients {options.coefficients} has none of {key[0]} by {key[1]} on {key[2]}, which {path} ran")
        found[path] = comparison.compare(Path(path), entry)
    return run_report.compared(found, as_json=options.json)
