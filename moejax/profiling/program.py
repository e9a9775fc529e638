"""A compiled program as the trace embeds it: where each instruction's time belongs, and what it computes and moves.

A fusion's own path is that of its root, and lies: the time of a fusion is split among the instructions in it. If there is a heavy one
(a matrix product, a sort, a scatter, a library call) it has all of it; else each counts by its elements. What XLA adds without a path
(copies, broadcasts) counts where its operand comes from, or where it goes.

FLOPs and bytes are counted per execution. Of a loop whose trip count the compiler knows, the body runs so often; of one whose count
depends on the data (the experts' tiles), as often as the trace shows.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from moejax.profiling import scopes
from moejax.profiling.scopes import NOWHERE, Place
from moejax.profiling.xplane import MESSAGES

CONTAINERS = frozenset({"while", "call", "conditional", "async-start", "async-done", "async-update"})
"""What only runs other instructions: no work of their own."""
FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id", "replica-id"}
)
_HEAVY = frozenset({"dot", "convolution", "custom-call", "sort", "scatter", "reduce-window", "select-and-scatter", "fft"})
_TRANSCENDENTAL = frozenset(
    {"exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "logistic", "power", "sine", "cosine", "rsqrt", "sqrt", "erf"}
)  # fmt: skip
_MOVES = frozenset(
    {
        "broadcast", "reshape", "transpose", "copy", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "gather",
        "pad", "reverse", "iota",
    }
)  # fmt: skip
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 4, 12: 8, 15: 8, 16: 2, 18: 16, 21: 0.5, 22: 0.5}
"""xla.PrimitiveType -> bytes of an element (4-bit types pack two); the 8-bit floats and unknown ones: 1."""
BF16 = 16  # xla.PrimitiveType
_ON_CHIP = 1  # of a TPU's memory spaces
_NO_BYTES = {0, 14, 17}  # invalid, opaque, token


Trips = Callable[[str, int | None], float]
"""How often a loop's body runs (None), or a conditional's branch (its number), by the path of the instruction."""


class Cost(NamedTuple):
    """What a stage must compute and move: floating point operations (a multiply-add is two), and bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Any) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: float) -> Cost:
        return Cost(self.flops * count, self.bytes * count)


def elements(shape: Any, of_element: Callable[[int], float] = lambda _: 1) -> float:
    """Number of elements, or what they have in all, by their xla.PrimitiveType; of a tuple, of all its parts."""
    if shape.tuple_shapes:
        return sum(elements(s, of_element) for s in shape.tuple_shapes)
    return 0 if shape.element_type in _NO_BYTES else math.prod(shape.dimensions) * of_element(shape.element_type)


def module_of(compiled: Any) -> Any:
    """The optimized HloModuleProto of a compiled jax function, also of one for a device that is not there."""
    module = compiled.runtime_executable().hlo_modules()[0]
    return MESSAGES["HloModuleProto"].FromString(module.as_serialized_hlo_module_proto())


def size(shape: Any) -> float:
    """Bytes of an array, or of all arrays of a tuple."""
    return elements(shape, lambda kind: _BYTES.get(kind, 1))


def moved(shape: Any) -> float:
    """`size` without what lies on the chip of a TPU, whose layouts alone have tiles."""
    if shape.tuple_shapes:
        return sum(map(moved, shape.tuple_shapes))
    return 0.0 if shape.layout.memory_space == _ON_CHIP and shape.layout.tiles else size(shape)


class Program:
    """One HloModuleProto, with its instructions by name."""

    def __init__(self, module: Any):
        self.name: str = module.name
        self.computations = {c.id: c for c in module.computations}
        self.entry: int = module.entry_computation_id
        self.instructions = {i.name: i for c in module.computations for i in c.instructions}
        self._by_id = {i.id: i for i in self.instructions.values()}
        self._home = {i.id: c.id for c in module.computations for i in c.instructions}
        self._shares: dict[int, dict[Place, float]] = {}

    @cached_property
    def _users(self) -> Mapping[int, list[Any]]:
        users: dict[int, list[Any]] = defaultdict(list)
        for i in self.instructions.values():
            for operand in i.operand_ids:
                users[operand].append(i)
        return users

    @cached_property
    def _callers(self) -> dict[int, Any]:
        return {called: i for i in self.instructions.values() for called in i.called_computation_ids}

    def shares(self, name: str) -> dict[Place, float]:
        """Where an instruction's time belongs: places with shares that add up to one."""
        instruction = self.instructions.get(name)
        return {NOWHERE: 1.0} if instruction is None else self._shares_of(instruction)

    def _shares_of(self, instruction: Any) -> dict[Place, float]:
        if instruction.id not in self._shares:
            self._shares[instruction.id] = self._own(instruction) or self._inherited(instruction) or {NOWHERE: 1.0}
        return self._shares[instruction.id]

    def _own(self, instruction: Any) -> dict[Place, float]:
        """What the instruction's own paths say; nothing where it has none."""
        if instruction.opcode == "fusion":
            weights: dict[Place, float] = defaultdict(float)
            inside = [i for i in self._fused(instruction) if i.metadata.op_name]
            heavy = [i for i in inside if i.opcode in _HEAVY]
            for i in heavy or inside:
                weights[scopes.place(i.metadata.op_name)] += self._weight(i)
            total = sum(weights.values())
            if total:
                return {place: w / total for place, w in weights.items() if w}
        path = instruction.metadata.op_name
        return {scopes.place(path): 1.0} if path else {}

    def _inherited(self, instruction: Any) -> dict[Place, float]:
        """Of an instruction without a path: what its operands say, else its users, else what calls it. Breadth first."""
        for neighbours in (self.operands, lambda i: self._users[i.id]):
            frontier, seen = [instruction], {instruction.id}
            for _ in range(8):
                frontier = [n for i in frontier for n in neighbours(i) if n.id not in seen]
                seen.update(i.id for i in frontier)
                for found in frontier:
                    own = self._own(found) if found.opcode not in FREE else {}
                    if own:
                        return own
        caller = self._callers.get(self._home[instruction.id])
        return {} if caller is None else self._shares_of(caller)

    def operands(self, instruction: Any) -> list[Any]:
        """The instructions whose results it takes."""
        return [self._by_id[i] for i in instruction.operand_ids]

    def _fused(self, fusion: Any) -> Iterable[Any]:
        """All instructions of a fusion, nested ones included."""
        for called in fusion.called_computation_ids:
            for i in self.computations[called].instructions:
                yield i
                if i.opcode in ("fusion", "call"):
                    yield from self._fused(i)

    def _weight(self, i: Any) -> float:
        """Share of a fusion's time that an instruction in it takes, in elements."""
        if i.opcode in FREE or i.opcode in ("broadcast", "fusion", "iota", "reshape"):
            return 0.0
        if i.opcode in ("dot", "convolution"):
            return max(self.flops_of(i), 1.0)
        if i.opcode in ("reduce", "sort", "reduce-window"):
            return float(sum(elements(o.shape) for o in self.operands(i)))
        return elements(i.shape) * (8.0 if i.opcode in _TRANSCENDENTAL else 1.0)

    def flops_of(self, i: Any) -> float:
        """Floating point operations of one execution, what it calls included if it is a fusion."""
        if i.opcode == "fusion":
            return sum(self.flops_of(part) for part in self._fused(i) if part.opcode != "fusion")
        if i.opcode == "dot":
            lhs = self._by_id[i.operand_ids[0]].shape.dimensions
            return 2.0 * elements(i.shape) * math.prod(lhs[d] for d in i.dot_dimension_numbers.lhs_contracting_dimensions)
        if i.opcode == "convolution":
            return self._convolution_flops(i)
        if i.opcode == "custom-call":
            return self._library_flops(i)
        if i.opcode in ("reduce", "reduce-window"):
            return float(sum(elements(o.shape) for o in self.operands(i)) / 2)
        if i.opcode in FREE or i.opcode in _MOVES or i.opcode in CONTAINERS or i.opcode in ("convert", "compare", "select", "sort"):
            return 0.0
        return float(elements(i.shape))

    def _convolution_flops(self, i: Any) -> float:
        """Of a TPU's matrix product: products along a spatial axis (of a batch, mostly) count where the window meets a number, and not what
        padding or dilation put there."""
        base, kernel = (self._by_id[operand].shape.dimensions for operand in i.operand_ids[:2])
        numbers, out = i.convolution_dimension_numbers, i.shape.dimensions
        met = 1
        for window, inner, outer in zip(
            i.window.dimensions, numbers.input_spatial_dimensions, numbers.output_spatial_dimensions, strict=True
        ):
            dilation = window.base_dilation or 1
            places = np.add.outer(
                np.arange(out[outer]) * (window.stride or 1), np.arange(window.size) * (window.window_dilation or 1)
            ) - window.padding_low
            met *= int(np.sum((places >= 0) & (places <= (base[inner] - 1) * dilation) & (places % dilation == 0)))
        features = out[numbers.output_batch_dimension] * out[numbers.output_feature_dimension]
        return 2.0 * met * features * kernel[numbers.kernel_input_feature_dimension]

    def _library_flops(self, i: Any) -> float:
        """Of a matrix product by a library (cuBLAS): its dimension numbers stand in the call's own settings. Of a TPU's kernel what it says
        itself."""
        try:
            config = json.loads(i.backend_config or b"{}")
            if "custom_call_config" in config:
                return float(config["custom_call_config"]["cost_estimate"]["flops"])
            numbers = (config.get("gemm_backend_config") or config)["dot_dimension_numbers"]
            lhs = self._by_id[i.operand_ids[0]].shape.dimensions
            contracting = math.prod(lhs[int(d)] for d in numbers["lhs_contracting_dimensions"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return 0.0
        result = i.shape.tuple_shapes[0] if i.shape.tuple_shapes else i.shape
        return 2.0 * elements(result) * contracting

    def bytes_of(self, i: Any) -> float:
        """Bytes that one execution must read and write: of what is sliced, the slice; of what is updated in place, the update."""
        if i.opcode in FREE or i.opcode in CONTAINERS:
            return 0.0
        if i.opcode == "fusion":
            return self._fusion_bytes(i)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            source = self._by_id[i.operand_ids[0]].shape
            return moved(i.shape) + (size(i.shape) if moved(source) else 0.0)
        if i.opcode in ("dynamic-update-slice", "scatter"):
            updates = self._by_id[i.operand_ids[1 if i.opcode == "dynamic-update-slice" else -1]]
            return moved(updates.shape) + (size(updates.shape) if moved(i.shape) else 0.0)
        if i.opcode in ("copy-start", "copy-done") and (i.shape.layout.tiles or any(s.layout.tiles for s in i.shape.tuple_shapes)):
            return sum(map(moved, i.shape.tuple_shapes[:2]))  # the copy, and what it is of: of the start alone
        return moved(i.shape) + sum(moved(o.shape) for o in self.operands(i))

    def copies(self, i: Any, count: int, kind: int) -> bool:
        """Whether it reads an array of this many elements of a type (xla.PrimitiveType) that its computation was given, writes at least as
        much, and is no product."""
        given = (o.shape for o in self.operands(i) if o.opcode == "get-tuple-element")
        reads = any(not s.tuple_shapes and s.element_type == kind and math.prod(s.dimensions) == count for s in given)
        return reads and not self.is_product(i) and self.written(i) >= count * _BYTES[kind]

    def loops_of_data(self) -> set[int]:
        """The computations that run as often as data say: bodies and conditions of loops whose trip count the compiler does not know,
        and what they call."""
        waiting = [i for i in self.instructions.values() if i.opcode == "while" and known_trips(i) is None]
        found: set[int] = set()
        while waiting:
            for called in waiting.pop().called_computation_ids:
                found.add(called)
                waiting += [i for i in self.computations[called].instructions if i.opcode in CONTAINERS]
        return found

    def is_product(self, i: Any) -> bool:
        """Whether it is a matrix product, a library's or one inside a fusion included."""
        if i.opcode == "custom-call":
            return self._library_flops(i) > 0
        return i.opcode in ("dot", "convolution") or (i.opcode == "fusion" and any(self.is_product(part) for part in self._fused(i)))

    def written(self, i: Any) -> float:
        """Bytes that one execution writes; of an update in place, the update."""
        if i.opcode in FREE or i.opcode in CONTAINERS:
            return 0.0
        if i.opcode == "fusion":
            body = self.computations[i.called_computation_ids[0]]
            return self._written(self._by_id[body.root_id], self._by_id)
        return size(self._by_id[i.operand_ids[1]].shape) if i.opcode == "dynamic-update-slice" else size(i.shape)

    def _fusion_bytes(self, fusion: Any) -> float:
        body = self.computations[fusion.called_computation_ids[0]]
        inside = {i.id: i for i in body.instructions}
        users: dict[int, list[Any]] = defaultdict(list)
        for i in body.instructions:
            for operand in i.operand_ids:
                users[operand].append(i)
        total = self._written(inside[body.root_id], inside)
        for i in body.instructions:
            if i.opcode == "parameter":
                total += self._read(i, users)
        return total

    def _written(self, root: Any, inside: Mapping[int, Any]) -> float:
        if root.opcode == "tuple":
            return sum(self._written(inside[o], inside) for o in root.operand_ids)
        while root.opcode == "bitcast":
            root = inside[root.operand_ids[0]]
        if root.opcode == "dynamic-update-slice":
            return size(inside[root.operand_ids[1]].shape) if moved(root.shape) else 0.0
        return moved(root.shape)

    def _read(self, i: Any, users: Mapping[int, list[Any]]) -> float:
        """Bytes read of an operand: as much as its users inside need."""
        whole, total = moved(i.shape), 0.0
        for user in users[i.id] if whole else ():
            if user.opcode == "fusion":  # a TPU's stand in one another
                inside = self.computations[user.called_computation_ids[0]].instructions
                given = [n for n, operand in enumerate(user.operand_ids) if operand == i.id]
                read = sum(self._read(p, self._users) for p in inside if p.opcode == "parameter" and p.parameter_number in given)
                a_copy = size(user.shape) == size(i.shape) and users[user.id]
                total += min(read, self._read(user, users)) if a_copy else read
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operand_ids[0] == i.id:
                total += size(user.shape)
            elif user.opcode == "bitcast":
                total += self._read(user, users)
            elif not (user.opcode == "dynamic-update-slice" and user.operand_ids[0] == i.id):
                return whole
        return min(whole, total)

    def executions(self, events_per_run: Mapping[str, float], trips: Trips | None = None) -> dict[int, float]:
        """How often each computation (by id) runs in one run of the program.

        events_per_run: events of an instruction by its name; needed for loops whose trip count the compiler does not know. Without a
        trace `trips` says the (mean) count of such a loop, or of a conditional's branch, by its path.
        """
        counts = {self.entry: 1.0}
        waiting = [self.entry]
        while waiting:
            computation = waiting.pop()
            for i in self.computations[computation].instructions:
                if i.opcode not in CONTAINERS:
                    continue
                for called in i.called_computation_ids:
                    times = self._times(i, called, counts[computation], events_per_run, trips)
                    counts[called] = counts.get(called, 0.0) + times
                    waiting.append(called)
        return counts

    def _times(
        self, caller: Any, called: int, outer: float, events_per_run: Mapping[str, float], trips: Trips | None
    ) -> float:
        if caller.opcode not in ("while", "conditional"):
            return outer
        known = known_trips(caller)
        if caller.opcode == "while" and known is not None:
            return outer * known
        if caller.opcode == "while" and trips is not None:
            return outer * trips(caller.metadata.op_name, None)
        if caller.opcode == "conditional" and trips is not None:
            return outer * trips(caller.metadata.op_name, list(caller.called_computation_ids).index(called))
        body = [i for i in self.computations[called].instructions if i.opcode not in FREE]
        seen = [events_per_run[i.name] for i in body if i.name in events_per_run]
        return statistics.median(seen) if seen else 0.0

    def costs(self, events_per_run: Mapping[str, float], trips: Trips | None = None) -> dict[Place, Cost]:
        """FLOPs and bytes of one run of the program, by place; a fusion's are split as its time is, its FLOPs where they arise."""
        total: dict[Place, Cost] = defaultdict(Cost)
        for computation, count in self.executions(events_per_run, trips).items():
            for i in self.computations[computation].instructions:
                moved = self.bytes_of(i)
                parts = list(self._fused(i)) if i.opcode == "fusion" else [i]
                shares = self._shares_of(i) if moved or any(p.opcode not in FREE for p in parts) else {}
                for where, share in shares.items():
                    total[where] += Cost(0.0, moved * share * count)
                for p in parts:
                    flops = 0.0 if p.opcode == "fusion" else self.flops_of(p)
                    if flops:
                        path = p.metadata.op_name
                        for where, share in ({scopes.place(path): 1.0} if path else shares).items():
                            total[where] += Cost(flops * share * count, 0.0)
        return dict(total)


def known_trips(loop: Any) -> float | None:
    """How often a loop runs, where the compiler knows it."""
    try:
        return float(json.loads(loop.backend_config)["known_trip_count"]["n"])
    except (ValueError, KeyError, TypeError):
        return None
