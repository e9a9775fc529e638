"""`step_profile.json`, version 2: what one training step was, took and cost. Written by whatever ran, read by whatever compares.

All fields are there, null where the writer does not know. Numbers are per optimizer step: seconds, bytes, FLOPs, tokens. Of several devices
batch and expert_load are all devices', and what is timed, moved or kept is one device's, the mean. No jax here.

Version 1 had no devices, mode, collectives and phases.collectives: it was of one device, and is read as such.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from moejax.config_values import Section
from moejax.documents import read_json, sealed, unsealed
from moejax.errors import UserError
from moejax.files import replace_text

FILE_NAME = "step_profile.json"
VERSION, OLDEST = 2, 1

Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class Device(Section):
    """peaks_measured: the two peaks were measured by a matmul and a copy on this machine (else they are the data sheet's)."""

    name: str
    memory_bytes: Count | None
    peak_flops: Amount | None
    peak_bytes_per_second: Amount | None
    peaks_measured: bool | None


class ModelCounts(Section):
    """Parameters. total and active (met by one token) without adapters; trainable: what the optimizer changes."""

    name: str
    params_total: Count | None
    params_active: Count | None
    params_trainable: Count | None


class Moe(Section):
    """backend: how the experts' matmuls are done ("loop", "dense", …)."""

    experts: Count
    top_k: Count
    backend: str | None


class Batch(Section):
    """One optimizer step, all micro-batches together; means over the traced steps. tokens: computed ones, padding included."""

    batching: Literal["pad_longest", "pad_bucket", "pack", "fixed"]
    rows: Amount | None
    row_tokens: Amount | None
    queries: Amount | None
    tokens: Amount | None
    real_tokens: Amount | None
    supervised_tokens: Amount | None


class StepSeconds(Section):
    """Of n steps that were not traced."""

    median: Amount | None
    p10: Amount | None
    p90: Amount | None
    n: Count


class Memory(Section):
    """compiler_peak: of the compiled step, arguments included. measured_peak: the allocator's, or a CPU process's resident memory."""

    compiler_peak_bytes: Count | None
    measured_peak_bytes: Count | None
    arguments_bytes: Count | None
    temporaries_bytes: Count | None


class Phases(Section):
    """Seconds per step. collectives: in which a device did nothing else."""

    forward: Amount | None
    recompute: Amount | None
    backward: Amount | None
    optimizer: Amount | None
    other: Amount | None
    collectives: Amount | None
    idle: Amount | None


class Cost(Section):
    """What a scope's instructions do in one step."""

    flops: Amount | None
    bytes: Amount | None


class Collective(Section):
    """What one kind of collective does: how often, bytes that a device receives, seconds of which it does nothing else, and the others."""

    count: Amount | None
    bytes: Amount | None
    exposed_seconds: Amount | None
    overlapped_seconds: Amount | None


class StepProfile(Section):
    """The contract. layers, moe_kernels: seconds per step by scope; expert_load: tokens per expert by layer (the model's own number); mode:
    where the weights lie on several devices, as in the config's mesh.weights; collectives: by kind ("all-gather", …)."""

    schema_version: Literal[2]
    framework: Literal["jax", "pytorch"]
    versions: dict[str, str]
    device: Device
    model: ModelCounts
    method: Literal["qlora", "lora", "full"]
    precision: str | None
    remat: str | None
    moe: Moe
    batch: Batch
    step_seconds: StepSeconds
    compile_seconds: Amount | None
    memory: Memory
    phases: Phases | None
    layers: dict[str, Amount] | None
    moe_kernels: dict[str, Amount] | None
    cost: dict[str, Cost] | None
    expert_load: dict[str, list[Amount]] | None
    devices: Annotated[int, Field(ge=1)]
    mode: Literal["whole", "spread", "experts"] | None
    collectives: dict[str, Collective] | None


def write(profile: StepProfile, path: Path) -> None:
    """Write the file, with the hash of what it says: what is there is whole."""
    replace_text(path, json.dumps(sealed(profile.model_dump(mode="json")), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> StepProfile:
    """Read a file, or the one in a run's folder. Raises UserError naming file, field and value."""
    if path.is_dir():
        path = path / FILE_NAME
    again = "write it again with `moejax profile CONFIG`"
    if not path.is_file():
        raise UserError(f"{path} does not exist (expected the {FILE_NAME} of a profiled run): make one with `moejax profile CONFIG`")
    content = unsealed(read_json(path, remedy=again), str(path))
    version = content.get("schema_version")
    if type(version) is not int or not OLDEST <= version <= VERSION:
        found = "schema_version is missing" if version is None else f"schema_version = {version!r}"
        raise UserError(f"{path}: {found}, this moejax reads versions {OLDEST} to {VERSION}: {again}")
    try:
        return StepProfile.model_validate(_of_one_device(content) if version == 1 else content)
    except ValidationError as error:
        problems = "; ".join(_explain(e) for e in error.errors()[:5])
        raise UserError(f"{path}: {problems}. Mend the file, or {again}") from None


def _of_one_device(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 as version 2."""
    phases = content.get("phases")
    between = {"phases": {"collectives": 0.0} | phases} if isinstance(phases, dict) else {}
    return content | between | {"schema_version": 2, "devices": 1, "mode": None, "collectives": {}}


def _explain(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{path} is missing (null where it is not known)"
    if error["type"] == "extra_forbidden":
        return f"unknown field {path}"
    return f"{path} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"
