"""Reading `*.xplane.pb`, the profiler's file: events on lines of planes, and the compiled programs that it embeds.

The messages are declared here field by field, as far as they are used (tsl/profiler/protobuf/xplane.proto and xla/service/hlo.proto name
and number them), and protobuf reads the bytes: no TensorFlow, and nothing but what tensorboard brings anyway.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from moejax.errors import UserError

# message -> {field: (number, type)}; a type in brackets is repeated, {…} is a map from int64. What is not declared stays as it is in a file
# that is written again.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "XSpace": {"planes": (1, "[XPlane]"), "hostnames": (4, "[string]")},
    "XPlane": {
        "name": (2, "string"), "lines": (3, "[XLine]"), "event_metadata": (4, "{XEventMetadata}"), "stat_metadata": (5, "{XStatMetadata}"),
    },
    "XLine": {"id": (1, "int64"), "name": (2, "string"), "timestamp_ns": (3, "int64"), "events": (4, "[XEvent]")},
    "XEvent": {"metadata_id": (1, "int64"), "offset_ps": (2, "int64"), "duration_ps": (3, "int64"), "stats": (4, "[XStat]")},
    "XStat": {
        "metadata_id": (1, "int64"), "uint64_value": (3, "uint64"), "int64_value": (4, "int64"), "str_value": (5, "string"),
        "bytes_value": (6, "bytes"), "ref_value": (7, "uint64"),
    },
    "XEventMetadata": {"id": (1, "int64"), "name": (2, "string"), "display_name": (4, "string"), "stats": (5, "[XStat]")},
    "XStatMetadata": {"id": (1, "int64"), "name": (2, "string")},
    "HloProto": {"hlo_module": (1, "HloModuleProto")},
    "HloModuleProto": {
        "name": (1, "string"), "computations": (3, "[HloComputationProto]"), "id": (5, "int64"), "entry_computation_id": (6, "int64"),
    },
    "HloComputationProto": {"instructions": (2, "[HloInstructionProto]"), "id": (5, "int64"), "root_id": (6, "int64")},
    "HloInstructionProto": {
        "name": (1, "string"), "opcode": (2, "string"), "shape": (3, "ShapeProto"), "metadata": (7, "OpMetadata"),
        "parameter_number": (9, "int64"), "window": (15, "Window"), "convolution_dimension_numbers": (16, "ConvolutionDimensionNumbers"),
        "dot_dimension_numbers": (30, "DotDimensionNumbers"), "id": (35, "int64"), "operand_ids": (36, "[int64]"),
        "called_computation_ids": (38, "[int64]"), "backend_config": (43, "bytes"),
    },
    "OpMetadata": {"op_name": (2, "string")},
    "ShapeProto": {
        "element_type": (2, "int32"), "dimensions": (3, "[int64]"), "tuple_shapes": (4, "[ShapeProto]"), "layout": (5, "LayoutProto"),
    },
    "LayoutProto": {"tiles": (6, "[bytes]"), "memory_space": (8, "int64")},
    "Window": {"dimensions": (1, "[WindowDimension]")},
    "WindowDimension": {
        "size": (1, "int64"), "stride": (2, "int64"), "padding_low": (3, "int64"), "window_dilation": (5, "int64"),
        "base_dilation": (6, "int64"),
    },
    "ConvolutionDimensionNumbers": {
        "kernel_input_feature_dimension": (3, "int64"), "output_batch_dimension": (9, "int64"), "output_feature_dimension": (10, "int64"),
        "input_spatial_dimensions": (11, "[int64]"), "output_spatial_dimensions": (12, "[int64]"),
    },
    "DotDimensionNumbers": {"lhs_contracting_dimensions": (1, "[int64]")},
}  # fmt: skip


def _declare() -> dict[str, Any]:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="moejax/xplane.proto", package="moejax", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind) in fields.items():
            declared = message.field.add(name=field_name, number=number)
            declared.label = kinds.LABEL_REPEATED if kind[0] in "[{" else kinds.LABEL_OPTIONAL
            element = kind.strip("[]{}")
            if kind[0] == "{":
                entry = message.nested_type.add(name=field_name.title().replace("_", "") + "Entry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_INT64)
                value = entry.field.add(name="value", number=2, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_MESSAGE)
                value.type_name = f".moejax.{element}"
                declared.type, declared.type_name = kinds.TYPE_MESSAGE, f".moejax.{name}.{entry.name}"
            elif element in _MESSAGES:
                declared.type, declared.type_name = kinds.TYPE_MESSAGE, f".moejax.{element}"
            else:
                declared.type = getattr(kinds, f"TYPE_{element.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"moejax.{name}")) for name in _MESSAGES}


MESSAGES = _declare()


@dataclass(frozen=True, slots=True)
class Event:
    """One execution of an instruction (on a GPU: of one of its kernels). Times in picoseconds since the epoch."""

    start: int
    end: int
    instruction: str  # name in the program; "" where the trace does not say (copies on a GPU)
    program: int  # key of Trace.programs; 0 where the trace does not say
    kernel: str
    op_name: str = ""  # the scope path, where the event itself has one (GPU)
    tasks: tuple[tuple[int, int], ...] = ()  # start, end of its parts that other threads ran (CPU)
    device: int = 0


@dataclass(frozen=True, slots=True)
class StepMarker:
    """A `jax.profiler.StepTraceAnnotation`. Times in picoseconds since the epoch."""

    number: int
    start: int
    end: int


@dataclass
class Trace:
    """What a trace says of one process's devices. `programs`: HloModuleProto by program id."""

    platform: str  # "cpu" or "gpu"
    path: Path
    events: list[Event] = field(default_factory=list)
    steps: list[StepMarker] = field(default_factory=list)
    programs: dict[int, Any] = field(default_factory=dict)
    compiled: list[str] = field(default_factory=list)  # programs that were compiled while the trace ran


def find(folder: Path) -> Path:
    """The trace file in a run's folder (or the file itself): of several profiles the latest.

    Raises UserError where there is none, or where one profile holds several hosts' traces.
    """
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run (expected a run's folder, or a *.xplane.pb file)")
    files = sorted(folder.glob("plugins/profile/*/*.xplane.pb")) or sorted(folder.glob("*.xplane.pb"))
    if not files:
        raise UserError(
            f"{folder} holds no trace (looked for plugins/profile/*/*.xplane.pb): make one with `moejax profile CONFIG`, or with "
            "profile: {start_step: 5, steps: 3} in the run's config"
        )
    latest = [file for file in files if file.parent == files[-1].parent]
    if len(latest) > 1:
        hosts = ", ".join(file.name.removesuffix(".xplane.pb") for file in latest)
        raise UserError(f"{latest[0].parent} holds traces of several hosts ({hosts}): give the file of one of them")
    return latest[0]


def read(path: Path) -> Trace:
    """Read one trace. Raises UserError for a file that is no whole trace, or that has no events of XLA programs."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        space = MESSAGES["XSpace"].FromString(content)
    except (DecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is no whole trace ({error}): was the run stopped while it was written? Profile again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    planes = {plane.name: plane for plane in space.planes}
    try:
        return _trace(path, planes)
    except (DecodeError, _Damaged) as error:
        raise UserError(f"{path} is damaged ({error}): profile again") from None


class _Damaged(Exception):
    """What a trace that was written whole does not hold."""


def _trace(path: Path, planes: dict[str, Any]) -> Trace:
    gpus = sorted((name for name in planes if re.fullmatch(r"/device:GPU:\d+", name)), key=lambda name: int(name.rpartition(":")[2]))
    busy = [name for name in gpus if planes[name].lines]
    trace = Trace("gpu" if gpus else "cpu", path)
    if "/host:metadata" in planes:
        trace.programs = _programs(planes["/host:metadata"])
    host = _threads(planes["/host:CPU"]) if "/host:CPU" in planes else []
    for span in (span for thread in host for span in thread):
        if "step_num" in span.stats:
            trace.steps.append(StepMarker(_number(span, "step_num"), span.start, span.end))
        if span.name.endswith("::RunBackend"):
            trace.compiled.append(span.name)
    if gpus:  # lines that are no streams are made from these
        for name in busy:
            device = int(name.rpartition(":")[2])
            trace.events += [_event(span, device) for thread in _threads(planes[name], "Stream") for span in thread]
    else:
        tasks = _tasks(host)
        spans = (span for thread in host for span in thread if span.stats.get("hlo_op"))
        trace.events = [_event(span, _number(span, "device_ordinal"), tasks.get(id(span), ())) for span in spans]
    if not trace.events:
        raise UserError(
            f"{path} has no events of XLA programs: was anything run while it was taken? On a CPU they need host_tracer_level >= 1"
        )
    trace.events.sort(key=lambda e: e.start)
    trace.steps.sort(key=lambda s: s.start)
    return trace


def _programs(plane: Any) -> dict[int, Any]:
    programs = {}
    for entry in plane.event_metadata.values():
        for stat in entry.stats:
            if stat.bytes_value:
                # The id that events carry stands in the entry's name, module(id), and in the module.
                module = MESSAGES["HloProto"].FromString(stat.bytes_value).hlo_module
                _check(module)
                named = entry.name.rpartition("(")[2].rstrip(")")
                programs[int(named) if named.lstrip("-").isdecimal() and len(named) < 21 else module.id] = module
    return programs


_TAKEN = {
    "dot": 2, "convolution": 2, "dynamic-slice": 1, "slice": 1, "gather": 1, "dynamic-update-slice": 2, "scatter": 1, "bitcast": 1,
}  # fmt: skip
"""Opcode -> operands that it has at least."""
_CALLED = {"fusion": 1, "async-start": 1}
_LARGEST = 2**63
"""Elements of an array, as XLA counts them."""


def _check(module: Any) -> None:
    """Raises _Damaged for a program that names what is not in it: XLA writes what is taken or called before what takes or calls it."""
    ids, names, computations = set[int](), set[str](), set[int]()
    for computation in module.computations:
        there: dict[int, Any] = {}
        for i in computation.instructions:
            wrong = i.id in ids or i.name in names or any(operand not in there for operand in i.operand_ids)
            wrong = wrong or any(called not in computations for called in i.called_computation_ids)
            wrong = wrong or len(i.operand_ids) < _TAKEN.get(i.opcode, 0) or len(i.called_computation_ids) < _CALLED.get(i.opcode, 0)
            if wrong or not _countable(i.shape) or not _dimensions(i, there):
                raise _Damaged(f"{i.name} of the program {module.name} is no instruction")
            ids.add(i.id)
            names.add(i.name)
            there[i.id] = i
        if computation.root_id not in there or computation.id in computations:
            raise _Damaged(f"a computation of the program {module.name} is not whole")
        computations.add(computation.id)
    if module.entry_computation_id not in computations:
        raise _Damaged(f"the program {module.name} does not begin")


def _countable(shape: Any) -> bool:
    return 0 <= math.prod(shape.dimensions) < _LARGEST and all(map(_countable, shape.tuple_shapes))


def _dimensions(i: Any, there: dict[int, Any]) -> bool:
    """Whether a product has the dimensions along which it is counted."""
    if i.opcode not in ("dot", "convolution"):
        return True
    left, right = (there[operand].shape.dimensions for operand in i.operand_ids[:2])
    if i.opcode == "dot":
        return all(0 <= d < len(left) for d in i.dot_dimension_numbers.lhs_contracting_dimensions)
    numbers, windows, out = i.convolution_dimension_numbers, i.window.dimensions, i.shape.dimensions
    inner, outer = numbers.input_spatial_dimensions, numbers.output_spatial_dimensions
    return (
        len(windows) == len(inner) == len(outer) and all(0 <= d < len(left) for d in inner)
        and all(0 <= d < len(out) for d in (*outer, numbers.output_batch_dimension, numbers.output_feature_dimension))
        and 0 <= numbers.kernel_input_feature_dimension < len(right)
        and all(0 < window.size * out[d] < _MOST_PLACES for window, d in zip(windows, outer, strict=True))
    )  # fmt: skip


_MOST_PLACES = 2**28
"""Of a convolution's windows along an axis: each is looked at."""


class _Span(NamedTuple):
    """An event as it is in the file, names in place of their numbers. Times in picoseconds since the epoch."""

    name: str
    start: int
    end: int
    stats: dict[str, Any]


def _threads(plane: Any, prefix: str = "") -> list[list[_Span]]:
    """The events of a plane's lines whose names begin so."""
    names = {key: entry.name for key, entry in plane.event_metadata.items()}
    keys = {key: entry.name for key, entry in plane.stat_metadata.items()}
    threads = []
    for line in plane.lines:
        if line.name.startswith(prefix):
            thread = []
            for e in line.events:
                start = line.timestamp_ns * 1000 + e.offset_ps
                stats = {keys.get(s.metadata_id, ""): s.str_value or s.int64_value or s.uint64_value or keys.get(s.ref_value, "")
                         for s in e.stats}  # fmt: skip
                if e.metadata_id not in names:
                    raise _Damaged(f"an event of line {line.name!r} has no name")
                thread.append(_Span(names[e.metadata_id], start, start + e.duration_ps, stats))
            threads.append(thread)
    return threads


def _number(span: _Span, key: str) -> int:
    """A whole number among an event's values, 0 where there is none."""
    value = span.stats.get(key) or 0
    if not isinstance(value, int):
        raise _Damaged(f"{key} = {value[:40]!r} of event {span.name[:40]!r} is no number")
    return value


def _event(span: _Span, device: int, tasks: Iterable[tuple[int, int]] = ()) -> Event:
    path = str(span.stats.get("tf_op") or span.stats.get("name") or "")
    instruction, program = str(span.stats.get("hlo_op", "")), _number(span, "program_id")
    return Event(span.start, span.end, instruction, program, span.name, path.rpartition(":")[0] or path, tuple(tasks), device)


_CALLER, _TASK, _TASK_END = (f"ThreadpoolListener::{name}" for name in ("Record", "StartRegion", "StopRegion"))


def _tasks(threads: list[list[_Span]]) -> dict[int, list[tuple[int, int]]]:
    """What other threads did for an operation: its span's id() -> [(start, end)].

    On a CPU an operation that is spread over threads hands out tasks and returns: its own event is short, and without the tasks such
    operations (dequantization first of all) would look free. The thread pool notes when a task is handed out, with a number, and when
    the task of that number begins and ends on its thread. The last task goes on to run what waited for the operation: a task's part ends
    where the next operation begins.
    """
    owners: dict[int, int] = {}
    parts: list[tuple[int, int, int]] = []
    for thread in threads:
        running: list[_Span] = []  # operations on this thread that have not ended
        task, begun = 0, 0
        for span in sorted(thread, key=lambda s: (s.start, -s.end)):
            operation = "hlo_op" in span.stats
            while running and running[-1].end < span.start:
                running.pop()
            if span.name == _CALLER and running:
                owners[_number(span, "_p")] = id(running[-1])
            elif span.name == _TASK:
                task, begun = _number(span, "_c"), span.start
            elif task and (operation or span.name == _TASK_END or span.name.startswith(("end: ", "ThunkExecutor"))):
                parts.append((task, begun, span.start))
                task = 0
            if operation:
                running.append(span)
    tasks: dict[int, list[tuple[int, int]]] = {}
    for task, begun, end in parts:
        if task in owners and end > begun:
            tasks.setdefault(owners[task], []).append((begun, end))
    return tasks
