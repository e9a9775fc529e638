"""Every reader of files, fed with damaged ones: `python tests/fuzz.py [READER …] [--mutations 20000] [--seed 0]`.

A damaged file is read, or refused with one UserError that names it; a traceback, ten seconds of CPU time, or more memory than the limit is
a fault. Each is shown once, by the line that raised it, with its first input (`--keep FOLDER` writes them). Exit code 1 where there is one.
"""

import argparse
import dataclasses
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import traces
import yaml
from damage import damaged
from safetensors.numpy import save

from moejax import config, gpus, json_lines
from moejax.commands import breakdown
from moejax.config_data import DataConfig
from moejax.data import conversation, sources
from moejax.documents import unsealed
from moejax.errors import UserError
from moejax.estimator import coefficients, comparison, prices
from moejax.hub.peft import load_adapter
from moejax.hub.safetensors_file import Reader as File
from moejax.hub.stored import weight_files
from moejax.hub.torch_file import TorchFile
from moejax.hub.weights import read_config
from moejax.models.build import build
from moejax.models.config import LORA_TARGETS, LoRAConfig, from_hub_config
from moejax.study.report import results

ROOT = Path(__file__).parent.parent
VECTORS = ROOT / "tests" / "vectors"
SECONDS, MEMORY = 10, 4 << 30


@dataclass(frozen=True)
class Reader:
    """seeds: whole files, by name; the one called `target` is damaged, the others lie next to it. read: of the folder."""

    seeds: Callable[[], list[dict[str, bytes]]]
    target: str
    read: Callable[[Path], Any]


# --- readers ---


def one(name: str, *paths: Path) -> Callable[[], list[dict[str, bytes]]]:
    return lambda: [{name: path.read_bytes()} for path in paths]


def documents(name: str, *contents: Any) -> Callable[[], list[dict[str, bytes]]]:
    return lambda: [{name: json.dumps(content).encode()} for content in contents]


METRICS = "".join(
    json.dumps({"step": s, "loss": 2.0 / s, "step_seconds": 0.1, "padded_tokens": 64, "host_peak_bytes": 10**9, "expert_load": [1]}) + "\n"
    for s in range(1, 6)
).encode()


def metrics(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    comparison.read_steps(folder, [1])
    json_lines.keep_until(path, 3, lambda _: None)


def prediction_seeds() -> list[dict[str, bytes]]:
    time = comparison.time_prediction(coefficients.study()[0], 0.25)
    told = {"compiler_peak_bytes": 90, "gpu": "A40", "model": "mixtral", "method": "qlora", "share": 0.25, "disturbed_steps": [1]}
    return [{"prediction.json": json.dumps(told | {"time": t}).encode(), "metrics.jsonl": METRICS} for t in (time, None)]


def gpu_file(folder: Path) -> None:
    gpus.from_yaml(folder / "gpus.yaml")


GPU_FILE = yaml.safe_dump(
    {"Mine": {"memory_gb": 32, "bandwidth_gb_per_second": 1790, "bf16_tflops": 210, "compute_capability": 8.6, "multiprocessors": 84,
              "l2_mb": 6, "clock_ghz": 1.7, "pcie": 4, "pcie_lanes": 16, "bf16": True, "source": "mine"}}
).encode()  # fmt: skip

DATA = (
    b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'
    b'{"instruction": "add", "input": "1 2", "output": "3"}\n'
    b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}\n'
    b'{"prompt": "p", "completion": "c", "tools": [{"name": "f", "parameters": {}}]}\n'
)


def data_seeds() -> list[dict[str, bytes]]:
    lines = DATA.splitlines()
    return [{"data.jsonl": line + b"\n" + line} for line in lines]


def data_json_seeds() -> list[dict[str, bytes]]:
    return [{"data.json": b"[" + line + b"," + line + b"]"} for line in DATA.splitlines()]


def table_seeds() -> list[dict[str, bytes]]:
    return [{"data.csv": b'instruction,output\r\n"add 1, 2",3\r\nb,"c ""d"""\r\n'}]


def parquet_seeds() -> list[dict[str, bytes]]:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"instruction": ["a", "b"], "output": ["c", "d"]}), sink)
    return [{"data.parquet": sink.getvalue().to_pybytes()}]


def data(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        for number, record in enumerate(sources.load_records(DataConfig(source=str(folder / name)))):
            if isinstance(record, dict):
                conversation.read(record, f"record {number}")

    return read


def model_configs() -> list[dict[str, bytes]]:
    found = [path.read_bytes() for path in sorted((ROOT / "assets").glob("*/config.json"))]
    for name in ("mixtral", "families", "gpt_oss", "latent"):
        with np.load(VECTORS / f"{name}.npz") as file:
            read = [json.loads(str(file[key])) for key in file.files if key.endswith("config") and not key.endswith("adapter_config")]
            found += [json.dumps({"model_type": name} | content).encode() for content in read]
    return [{"config.json": content} for content in found]


def adapter_seeds() -> list[dict[str, bytes]]:
    return [{path.name: path.read_bytes() for path in (VECTORS / "peft_all").iterdir()}]


@cache
def adapted_model() -> Any:
    """The model that tests/vectors/peft_all adapts."""
    with np.load(VECTORS / "mixtral.npz") as file:
        sizes = from_hub_config(json.loads(str(file["config"])) | {"model_type": "mixtral"})
    return build(sizes, adapter=LoRAConfig(4, 8.0, 0.0, LORA_TARGETS), dtype=jnp.float32)


def hub_index_seeds() -> list[dict[str, bytes]]:
    part = {f"model.layers.{i}.weight": np.zeros((2, 2), np.float32) for i in range(2)}
    index = {"metadata": {"total_size": 32}, "weight_map": dict.fromkeys(part, "model-00001-of-00001.safetensors")}
    return [{"model.safetensors.index.json": json.dumps(index).encode(), "model-00001-of-00001.safetensors": save(part)}]


def hub_files(folder: Path) -> None:
    for path in weight_files(folder):
        with closing(File(path)) as file:
            for name in file.names():
                file.read(name)


def torch_file(folder: Path) -> None:
    with TorchFile(folder / "tensors.bin") as file:
        for name in file.names():
            file.get_tensor(name)


def xplane_file(folder: Path) -> None:
    breakdown.load(folder / "t.xplane.pb")


def xplane_seeds() -> list[dict[str, bytes]]:
    """A real trace, which takes long to read, and mostly small ones: more of their bytes matter."""
    program = traces.module(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c @ x), None), x + 1, length=3)[0], jnp.ones((8, 8)))
    small = [space.SerializeToString() for space in (traces.cpu_space(program)[0], traces.gpu_space(program), traces.gpu_space(program, 2))]
    real = gzip.decompress((VECTORS / "mixtral-cpu.xplane.pb.gz").read_bytes())
    return [{"t.xplane.pb": content} for content in [real, *small * 5]]


def torch_trace_seeds() -> list[dict[str, bytes]]:
    content = json.loads(gzip.decompress((VECTORS / "torch-mixtral.json.gz").read_bytes()))
    steps = [e for e in content["traceEvents"] if "step" in str(e.get("name"))][:2]
    content["traceEvents"] = steps + content["traceEvents"][:300]
    return [{"t.json.gz": gzip.compress(json.dumps(content).encode())}]


def torch_trace(folder: Path) -> None:
    breakdown.load(folder / "t.json.gz")


STEP_PROFILE: dict[str, Any] = {
    "schema_version": 1, "framework": "jax", "versions": {},
    "device": {"name": "NVIDIA A40", "memory_bytes": 1, "peak_flops": 1e14, "peak_bytes_per_second": 1e12, "peaks_measured": False},
    "model": {"name": "mixtral", "params_total": 10, "params_active": 5, "params_trainable": 1}, "method": "qlora", "precision": "bfloat16",
    "remat": "full", "moe": {"experts": 8, "top_k": 2, "backend": "loop"},
    "batch": {"batching": "pack", "rows": 1, "row_tokens": 8, "queries": 1, "tokens": 8, "real_tokens": 8, "supervised_tokens": 4},
    "step_seconds": {"median": 1.0, "p10": 0.9, "p90": 1.1, "n": 5}, "compile_seconds": 1.0,
    "memory": {"compiler_peak_bytes": 9, "measured_peak_bytes": 9, "arguments_bytes": 4, "temporaries_bytes": 5},
    "phases": dict.fromkeys(("forward", "recompute", "backward", "optimizer", "other", "idle"), 0.1),
    "layers": {"moe": 0.3, "attention": 0.2},
    "moe_kernels": {"moe/w1": 0.1}, "cost": {"moe": {"flops": 1.0, "bytes": 1.0}}, "expert_load": {"0": [1, 2]},
}  # fmt: skip


def step_profile_file(folder: Path) -> None:
    breakdown.load(folder / "step_profile.json")


def result_seeds() -> list[dict[str, bytes]]:
    """Of a real study with some of its rows."""
    study = results.read(ROOT / "tests/study/report/fixtures/cpu_demo")
    with tempfile.TemporaryDirectory() as folder:
        results.write(dataclasses.replace(study, rows=study.rows[::30]), folder)
        return [{path.name: path.read_bytes() for path in Path(folder).iterdir()}]


def price_file(folder: Path) -> None:
    prices.load(str(folder / "prices.csv"))


def coefficient_seeds() -> list[dict[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.json"
        coefficients.write(path, coefficients.study()[:2])
        content = unsealed(json.loads(path.read_bytes()), "")  # else its hash refuses each damage
        return [{"c.json": json.dumps(content).encode()}]


PRICES = b"gpu,usd_per_hour,provider,day\nH100,2.5,X,2026-11-01\nL4,0.5,Y,2026-11-02\n"

READERS: dict[str, Reader] = {
    "config": Reader(one("run.yaml", *sorted((ROOT / "configs").glob("*.yaml"))), "run.yaml", lambda f: config.load(f / "run.yaml")),
    "gpu_file": Reader(lambda: [{"gpus.yaml": GPU_FILE}], "gpus.yaml", gpu_file),
    "prices": Reader(lambda: [{"prices.csv": PRICES}], "prices.csv", price_file),
    "metrics": Reader(lambda: [{"metrics.jsonl": METRICS}], "metrics.jsonl", metrics),
    "prediction": Reader(prediction_seeds, "prediction.json", comparison.compare),
    "coefficients": Reader(coefficient_seeds, "c.json", lambda f: coefficients.read(f / "c.json")),
    "data_jsonl": Reader(data_seeds, "data.jsonl", data("data.jsonl")),
    "data_json": Reader(data_json_seeds, "data.json", data("data.json")),
    "data_csv": Reader(table_seeds, "data.csv", data("data.csv")),
    "data_parquet": Reader(parquet_seeds, "data.parquet", data("data.parquet")),
    "model_config": Reader(model_configs, "config.json", read_config),
    "adapter_config": Reader(adapter_seeds, "adapter_config.json", lambda f: load_adapter(adapted_model(), f)),
    "adapter": Reader(adapter_seeds, "adapter_model.safetensors", lambda f: load_adapter(adapted_model(), f)),
    "hub_index": Reader(hub_index_seeds, "model.safetensors.index.json", hub_files),
    "safetensors": Reader(hub_index_seeds, "model-00001-of-00001.safetensors", hub_files),
    "torch_file": Reader(one("tensors.bin", VECTORS / "tensors.bin"), "tensors.bin", torch_file),
    "xplane": Reader(xplane_seeds, "t.xplane.pb", xplane_file),
    "step_profile": Reader(documents("step_profile.json", STEP_PROFILE), "step_profile.json", step_profile_file),
    "results": Reader(result_seeds, results.JSON_FILE, results.read),
    "study": Reader(result_seeds, results.STUDY_FILE, results.read),
    "torch_trace": Reader(torch_trace_seeds, "t.json.gz", torch_trace),
}


# --- the loop ---


@dataclass
class Fault:
    where: str
    what: str
    data: bytes
    count: int = 1


class Slow(BaseException):
    """Ten seconds of CPU time are over; no `except Exception` takes it."""


def _slow(*_: Any) -> None:
    raise Slow


def fuzz(name: str, mutations: int, seed: int) -> tuple[dict[str, int], dict[str, Fault]]:
    """Counts of what became of them, and the faults by the line that raised them."""
    reader, rng = READERS[name], random.Random(f"{name} {seed}")
    seeds = reader.seeds()
    counts, faults = {"read": 0, "refused": 0}, {}
    signal.signal(signal.SIGPROF, _slow)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as top:
        folder = Path(top) / "f"
        for _ in range(mutations):
            files, other = rng.choice(seeds), rng.choice(seeds)
            data = damaged(reader.target, files[reader.target], other[reader.target], rng)
            folder.mkdir()
            for file, content in files.items():
                (folder / file).write_bytes(data if file == reader.target else content)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                reader.read(folder)
                counts["read"] += 1
            except UserError as error:
                counts["refused"] += 1
                if str(folder) not in str(error) and reader.target not in str(error):
                    _found(faults, "message without its file", str(error)[:200], data)
            except (Exception, Slow) as error:  # noqa: BLE001
                frames = [f for f in traceback.extract_tb(error.__traceback__) if "/moejax/" in f.filename or "/models/" in f.filename]
                where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
                _found(faults, f"{type(error).__name__} at {where}", str(error)[:200], data)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            shutil.rmtree(folder)
    return counts, faults


def _found(faults: dict[str, Fault], where: str, what: str, data: bytes) -> None:
    if where in faults:
        faults[where].count += 1
    else:
        faults[where] = Fault(where, what, data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"some of {', '.join(READERS)} (default: all)")
    parser.add_argument("--mutations", type=int, default=20_000, help="number of damaged files of each reader (20000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the first input of each fault")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    bad = 0
    for name in options.readers or READERS:
        counts, faults = fuzz(name, options.mutations, options.seed)
        found = f"{sum(f.count for f in faults.values())} faults in {len(faults)} places"
        print(f"{name}: {counts['read']} read, {counts['refused']} refused, {found}", flush=True)
        for fault in faults.values():
            bad += 1
            print(f"  {fault.where} ({fault.count}): {fault.what!r}", flush=True)
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{name}-{bad}").write_bytes(fault.data)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
