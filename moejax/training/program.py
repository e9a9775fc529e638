"""A train step and what it works on, held once: compiled for this machine or for a GPU that is not there, without weights or with them.

From shapes alone nothing is in memory, and the compiler says what a run will take: in arguments and at its peak. For another GPU the extra
`aot` brings the CUDA plugin and ptxas; it is compiled by its description (estimator/targets.py), nothing runs, no kernel is autotuned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from moejax import installation, mesh, processes
from moejax.compiler_options import GPU_OPTIONS, HOST_OPTIONS, gpu_options, jit, lowering_for
from moejax.config import Experiment
from moejax.config_data import ROW_MULTIPLE
from moejax.data.batch import Batch, PairBatch
from moejax.data.batching import GivenBatches
from moejax.errors import UserError, first_line
from moejax.estimator.units import counted
from moejax.gpus import GPU, GPUS
from moejax.hub.buffers import moved
from moejax.hub.model import model_arguments
from moejax.models.build import Model, build, random_weights
from moejax.models.config import Architecture
from moejax.models.ops import choice, host
from moejax.profiling.capture import compile_profiled
from moejax.training import experts, room
from moejax.training.absent import Pinned, devices
from moejax.training.optimizer import make_optimizer, make_schedule
from moejax.training.step import Loss, Objective, TrainState, make_eval_step, make_train_step

_TOOLS = f"the compiler's own tools, with jax's plugin in jaxlib's version: {installation.for_extra('cuda12')}"
_WHAT_TO_TRY = (
    ("output tile sizes", f"rows of a multiple of {ROW_MULTIPLE} tokens, a single row (data.batch_rows=1), or another version of jax"),
    ("RESOURCE_EXHAUSTED", "fewer rows (data.batch_rows), shorter ones, or training.remat=full"),
    ("ptxas", _TOOLS),
    ("libdevice", _TOOLS),
)
CUBLAS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
"""Options of the compiler for a program in which Triton finds no tiles for a product: cuBLAS makes them all. Where XLA cannot autotune (no
card is there) it asks for tiles of 128 tokens on A100, A40 and L4, which a product over several rows of other lengths does not have."""
_ELSE = "another number of rows (data.batch_rows) or another version of jax (pip install -U jax), and report the message"


@dataclass(frozen=True)
class Compiled:
    """A step for batches of one shape: `executable(state, frozen, batch)`. Bytes by the compiler, of the peak arguments included; of the
    device, but for `host_bytes`, in the host's pinned memory. A CPU has one memory: there they are part of the others."""

    executable: Any
    peak_bytes: int
    argument_bytes: int
    temporary_bytes: int
    seconds: float
    host_bytes: int = 0


class Own(NamedTuple):
    """What a caller brings in the place of what the config says: see `moejax.train`."""

    optimizer: optax.GradientTransformation | None = None
    loss: Loss | None = None
    batches: GivenBatches | None = None


NOTHING_OWN = Own()


class TrainProgram:
    """An experiment's optimizer step. Its state and frozen weights are shapes until `load`; what is compiled stays, by rows and length.

    gpu: one that is not there (None: this machine's device). traced: compiled so that a trace tells its parts.
    dump: a folder for what XLA writes about the program.
    """

    def __init__(
        self, experiment: Experiment, config: Architecture, *, gpu: str | GPU | None = None, traced: bool = False, own: Own = NOTHING_OWN,
        dump: Path | None = None,
    ):  # fmt: skip
        self.experiment, self.config, self.traced, self._dump = experiment, config, traced, dump
        # Here without a sharding, as a run's own arguments have none: it is then the same program, and a cache on disk finds it.
        several = 1 if experiment.mesh is None else experiment.mesh.devices
        there = None if gpu is None else devices(gpu, several or 1)
        self._sharding = None if there is None else SingleDeviceSharding(there[0])
        self._card = card = GPUS[gpu] if isinstance(gpu, str) else gpu
        self._pinned = None if there is None else Pinned(Mesh(np.array(there[:1]), ("device",)), PartitionSpec())
        self._device = None if card is None else card.cuda_name
        memory_bytes = None if card is None else card.memory_bytes
        experts.check(experiment, config, self._device or choice.here())
        t = experiment.training
        schedule = make_schedule(t, t.steps or 1000) if own.optimizer is None else None
        self._optimizer = own.optimizer if schedule is None else make_optimizer(t, schedule)
        model = build(config, **model_arguments(experiment), platform=self._device, memory_bytes=memory_bytes)
        graphdef, trainable, self.frozen = split(model, full=experiment.adapter is None)
        self.objective = replace(objective(experiment, config, graphdef), loss=own.loss)
        if own.loss is not None and self.objective.layer_major:
            raise UserError(
                "training.accumulation = layer_major with a loss of your own, which is given one micro-batch at a time: expected "
                "micro_batch_major or auto"
            )
        self.devices = devices_of(experiment, config, there)
        self._step = make_train_step(self.objective, self._optimizer, schedule, experiment.seed, self.devices)
        self.state: TrainState = jax.eval_shape(lambda weights: initial_state(weights, self._optimizer), trainable)
        self.compiled: dict[tuple[int, int], Compiled] = {}
        self._refused: dict[tuple[int, int], room.NoRoom] = {}
        self.choosing_seconds = 0.0  # of programs that were compiled before, to choose settings that are `auto`

    @property
    def peak_bytes(self) -> int:
        """The largest of what was compiled."""
        return max((c.peak_bytes for c in self.compiled.values()), default=0)

    @property
    def device_count(self) -> int:
        return 1 if self.devices is None else self.devices.count

    @property
    def compile_seconds(self) -> float:
        return sum(c.seconds for c in self.compiled.values())

    def compile(self, rows: int, row_tokens: int) -> Compiled:
        """The step for micro-batches of this many rows. Raises UserError, in one message, where the compiler fails."""
        if (rows, row_tokens) in self.compiled:
            return self.compiled[rows, row_tokens]
        if (rows, row_tokens) in self._refused:
            raise self._refused[rows, row_tokens]
        if rows % self.device_count:
            raise UserError(f"batches of {counted(rows, 'row')} over {self.device_count} devices: expected a multiple of them")
        micro = self.experiment.training.gradient_accumulation
        shape = (micro, rows, row_tokens)
        integers, reals = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
        batch: Batch | PairBatch = Batch(integers, integers, reals, integers, integers)
        if self.objective.preference is not None:
            batch = PairBatch(integers, integers, reals, integers, integers, integers)
        given, results = self._given(self.state, self.frozen, batch)
        start = time.perf_counter()
        try:
            with lowering_for(self._card):
                lowering = jax.jit(self._step, donate_argnums=(0,), **results).lower(*given)
            try:
                executable = self._compiled(lowering, {})
            except jax.errors.JaxRuntimeError as error:
                if "output tile sizes" not in str(error):
                    raise
                executable = self._compiled(lowering, CUBLAS)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            what = f"the step of {self.experiment.name} ({'' if micro == 1 else f'{micro} x '}{counted(rows, 'row')} x {row_tokens} tokens)"
            on = self._device or jax.local_devices()[0].device_kind
            told = f"{what} does not compile for {on}: {first_line(error)}. Try {advice(error)}"
            wanted, available = room.read(str(error))
            if wanted is None or available is None:
                raise UserError(told) from error
            alone = wanted if room.of_temporaries(str(error)) else None
            wanted += 0 if alone is None else self._device_bytes(given)
            self._refused[rows, row_tokens] = room.NoRoom(told, wanted, available, alone)
            raise self._refused[rows, row_tokens] from error
        seconds, m = time.perf_counter() - start, executable.memory_analysis()
        in_host = self._host_bytes(given[1]) + m.host_temp_size_in_bytes
        compiled = Compiled(executable, _peak_bytes(executable), m.argument_size_in_bytes, m.temp_size_in_bytes, seconds, in_host)
        self.compiled[rows, row_tokens] = compiled
        return compiled

    def _given(self, *operands: Any) -> tuple[Any, dict[str, Any]]:
        """The step's operands as shapes that say where they lie; and where its results are to, as an option of `jax.jit`."""
        d = self.devices
        if d is None:
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self._place(a)), operands), {}
        state, frozen, batch = operands
        places = _of_state(d, state), d.of_weights(frozen), d.of_rows(batch, 1)
        if self._pinned is not None:
            places = jax.tree.map(lambda a, place: Pinned(d.mesh, place.spec) if host.is_host(a) else place, operands, places)
        given = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), operands, places)
        return given, {"out_shardings": (places[0], NamedSharding(d.mesh, mesh.WHOLE))}

    def _host_bytes(self, given: Any) -> int:
        """Of weights in the host's memory, those of one device."""
        if self.devices is None:
            return host.nbytes(self.frozen)
        arrays = [a for a, own in zip(jax.tree.leaves(given), jax.tree.leaves(self.frozen), strict=True) if host.is_host(own)]
        return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)

    def _device_bytes(self, given: Any) -> int:
        """Of operands, what each device has."""
        there = [a for a in jax.tree.leaves(given) if not host.is_host(a)]
        return sum(math.prod(a.shape if a.sharding is None else a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in there)

    def _place(self, array: Any) -> Any:
        """Where an operand lies: of this machine what is on the device needs no word."""
        if host.is_host(array):
            return self._pinned or host.sharding()
        return self._sharding

    def _compiled(self, lowering: Any, options: dict[str, str | bool]) -> Any:
        if self._on_gpu:
            chosen = gpu_options() if self._device is None else GPU_OPTIONS
            options = chosen | (HOST_OPTIONS if host.nbytes(self.frozen) else {}) | options
        if self._dump is not None:
            dump: dict[str, str | bool] = {"xla_dump_to": str(self._dump), "xla_dump_hlo_as_text": True}
            options = dump | options
        return compile_profiled(lowering, options) if self.traced else lowering.compile(compiler_options=options or None)

    def compile_within(self, rows: int, row_tokens: int, limit: int | None) -> Compiled:
        """`compile`. Raises UserError with the batch that would fit, where the peak exceeds `limit` bytes, or the compiler's own limit."""
        peak, allowed = self._needs(rows, row_tokens)
        usable = min(allowed, math.inf if limit is None else limit)
        if peak <= usable:
            return self.compile(rows, row_tokens)
        fits, n = self.rows_within(rows, row_tokens, usable), self.device_count
        one = "one row" if n == 1 else "a row a device"
        less = f"data.batch_rows={fits} would fit" if fits else f"not even {one} fits: use a shorter data.row_tokens or a larger device"
        raise UserError(
            f"out of memory: the step asks for {peak / 1e9:.2f} GB with {counted(rows, 'row')}, {usable / 1e9:.2f} GB are usable on "
            f"{jax.local_devices()[0].device_kind}; {less} (keep the batch by training.gradient_accumulation)"
        )

    def peak_of(self, rows: int, row_tokens: int) -> int:
        """Peak bytes of the step, of one that a TPU's compiler has no room for too."""
        return int(self._needs(rows, row_tokens)[0])

    def rows_within(self, rows: int, row_tokens: int, limit: float) -> int:
        """`room.rows_within` of this step."""
        return room.rows_within(lambda n: self._needs(n, row_tokens)[0], rows, limit, self.device_count)

    def _needs(self, rows: int, row_tokens: int) -> tuple[float, float]:
        """Peak bytes of the step, and what the compiler allows: a TPU's compiles nothing that exceeds the chip."""
        try:
            return self.compile(rows, row_tokens).peak_bytes, math.inf
        except room.NoRoom as error:
            if error.temporaries is None:
                return error.wanted, error.available
            # Next to its temporaries a program of other rows has the same: by what was compiled some arguments give their room.
            beside = [c.peak_bytes - c.temporary_bytes for (_, tokens), c in self.compiled.items() if tokens == row_tokens]
            return error.temporaries + beside[0] if beside else error.wanted, error.available

    def load(self, model: Model) -> None:
        """Weights in the places of shapes, and the optimizer's state as training begins with it."""
        graphdef, trainable, self.frozen = split(model, self.objective.full)
        self.objective = replace(self.objective, graphdef=graphdef)
        if self.devices is not None:
            trainable, self.frozen = (moved(part, self.devices.of_weights(part)) for part in (trainable, self.frozen))
        self.state = initial_state(trainable, self._optimizer, self.devices)

    def load_random(self) -> None:
        """Random weights from the seed, made on the device: for hardware studies, where only sizes matter."""
        self.load(random_weights(self.model(), jax.random.key(self.experiment.seed)))

    def model(self) -> Model:
        """The model as it stands."""
        return nnx.merge(self.objective.graphdef, self.state.trainable, self.frozen)

    def written(self) -> Model:
        """The model as it stands, to be written: what is trained on a mesh is a copy in the host's memory, of the first process's alone.
        All processes call it."""
        if self.devices is None:
            return self.model()
        return nnx.merge(self.objective.graphdef, jax.tree.map(processes.on_host, self.state.trainable), self.frozen)

    def step(self, batch: Batch | PairBatch) -> dict[str, jax.Array]:
        """Send a batch [A, rows, T] and one step on it to the device. Returns its metrics, without waiting for them."""
        _, rows, row_tokens = batch.tokens.shape
        executable = self.compile(rows, row_tokens).executable
        self.state, metrics = executable(self.state, self.frozen, self._sent(batch, 1))
        return metrics

    def _sent(self, batch: Any, axis: int) -> Any:
        """A batch on the device, or each device's rows of it, which stand on this axis."""
        if self.devices is None:
            return jax.device_put(batch)
        return jax.tree.map(_sent_to, batch, self.devices.of_rows(batch, axis))

    def timed(self, batch: Batch | PairBatch) -> tuple[float, dict[str, Any]]:
        """Seconds of one step, from sending the batch to having its loss, and its metrics on the host."""
        start = time.perf_counter()
        metrics = self.step(batch)
        float(metrics["loss"])
        seconds = time.perf_counter() - start
        return seconds, jax.device_get(metrics)

    @property
    def _on_gpu(self) -> bool:
        return jax.default_backend() == "gpu" if self._card is None else self._card.platform != "tpu"

    @cached_property
    def _evaluate(self) -> Any:
        return jit(make_eval_step(self.objective, self.devices))

    def evaluate(self, batch: Batch | PairBatch) -> tuple[dict[str, float], float]:
        """Of a batch [rows, T]: sums by name, and what they are divided by, as `make_eval_step` has them."""
        found, weight = self._evaluate(self.state.trainable, self.frozen, self._sent(batch, 0))
        return {name: float(value) for name, value in found.items()}, float(weight)


def devices_of(experiment: Experiment, config: Architecture, there: Sequence[Any] | None = None) -> mesh.Devices | None:
    """The mesh of a run (None: one device), of this machine's devices, or of these, for which any rows may be asked. Raises UserError for
    devices that are not there, and for rows or experts that do not divide."""
    if experiment.mesh is None:
        return None
    devices = mesh.devices(experiment.mesh, there)
    try:
        if there is None:
            experiment.mesh.check_rows(devices.count, experiment)
        experiment.mesh.check_experts(devices.count, config.num_experts)
    except ValueError as error:
        raise UserError(str(error)) from None
    return devices


def split(model: Model, full: bool) -> tuple[Any, nnx.State, nnx.State]:
    """graphdef, trainable, frozen. LoRAParam is a Param, so an adapter's run has nothing else among its Params."""
    parts: Any = nnx.split(model, nnx.Param if full else nnx.LoRAParam, ...)
    graphdef, trainable, frozen = parts
    return graphdef, trainable, frozen


def objective(experiment: Experiment, config: Architecture, graphdef: Any) -> Objective:
    t = experiment.training
    if t.remat == "auto":
        raise UserError("training.remat = auto is resolved by a training run only: set none, dots, full or offload here")
    dropout = 0.0 if experiment.adapter is None else experiment.adapter.dropout
    return Objective(
        graphdef, full=experiment.adapter is None, remat=t.remat, label_smoothing=t.label_smoothing, dropout=dropout,
        aux_loss_coef=experiment.model.aux_loss_coef, chunk_tokens=t.loss_chunk(config.vocab_size), stochastic=t.rounds_stochastically,
        preference=experiment.preference, layer_major=t.together > 1, skip_bad=t.on_bad_step == "skip",
    )  # fmt: skip


def initial_state(
    trainable: nnx.State, optimizer: optax.GradientTransformation, devices: mesh.Devices | None = None
) -> TrainState:
    """devices: where the weights lie already, and the rest is to lie."""

    def made(trainable: nnx.State) -> TrainState:
        return TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32))

    if devices is None:
        return made(trainable)
    rest = _of_state(devices, jax.eval_shape(made, trainable))
    opt_state = jax.jit(optimizer.init, out_shardings=rest.opt_state)(trainable)
    return TrainState(trainable, opt_state, jax.device_put(jnp.zeros((), jnp.int32), rest.step))


def _sent_to(array: np.ndarray, place: NamedSharding) -> jax.Array:
    """To each device of this process what it has of an array that all processes have. (device_put would compare it over the network.)"""
    parts = [jax.device_put(array[index], device) for device, index in place.addressable_devices_indices_map(array.shape).items()]
    return jax.make_array_from_single_device_arrays(array.shape, place, parts)


def _of_state(devices: mesh.Devices, state: TrainState) -> TrainState:
    """Where a state lies."""
    return TrainState(devices.of_weights(state.trainable), devices.of_optimizer(state.opt_state), devices.whole(state.step))


def _peak_bytes(executable: Any) -> int:
    """Peak memory, arguments included. The GPU compiler gives it, of the memory with most temporaries: where that may be the host's, and on
    a CPU, whose peak leaves them out, it is added up."""
    m = executable.memory_analysis()
    total = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    if {d.platform for s in jax.tree.leaves(executable.input_shardings) for d in s.device_set} != {"cpu"}:
        peak = int(m.peak_memory_in_bytes) - int(m.host_argument_size_in_bytes)  # it counts the host's arguments too
        return min(peak, int(total)) if m.host_temp_size_in_bytes else peak
    return max(total, int(getattr(m, "peak_memory_in_bytes", 0) or 0))


def advice(error: BaseException) -> str:
    """What to try about an error of XLA's."""
    return next((advice for mark, advice in _WHAT_TO_TRY if mark in str(error)), _ELSE)
