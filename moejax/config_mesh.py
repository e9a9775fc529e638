"""The section `mesh`: several devices, and what of the weights each of them holds. No jax here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from moejax.config_values import Positive, Section

AUTO = "auto"


class MeshConfig(Section):
    """Several devices. The rows of every batch are spread over them; data.batch_rows are those of all devices together."""

    devices: Positive | None = Field(None, description="number of devices in all processes; null: all")
    weights: Literal["whole", "spread", "experts"] = Field(
        "whole", description="weights on each device: all; a part of the rows of frozen matrices, gathered for use; or its own experts "
        "with their adapters"
    )  # fmt: skip
    moments: Literal["whole", "spread"] = Field("whole", description="optimizer state: all on each device, or spread")
    coordinator: Annotated[str, Field(pattern=r"^(auto|[^\s:]+:\d+)$")] | None = Field(
        None, description="host:port of process 0, for several processes; null: one process, or from the environment of srun or mpirun; "
        "auto: as jax finds it, e.g. on the hosts of a TPU slice"
    )  # fmt: skip
    processes: Positive | None = Field(None, description="number of processes, with a coordinator; null: from srun or mpirun")
    process_id: Annotated[int, Field(ge=0)] | None = Field(None, description="index of this process, from 0")

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {name: getattr(self, name) is not None for name in ("coordinator", "processes", "process_id")}
        missing = ", ".join(name for name, there in given.items() if not there)
        if (given["processes"] or given["process_id"]) and missing:
            raise ValueError(
                f"{missing}: not set: coordinator, processes and process_id are given together; under srun or mpirun, which say the rest, "
                "the coordinator alone or none of them"
            )
        if self.coordinator == AUTO and given["processes"]:
            raise ValueError("coordinator = auto: jax finds processes and process_id too: leave them out")
        if self.process_id is not None and self.processes is not None and self.process_id >= self.processes:
            raise ValueError(f"process_id = {self.process_id}: expected 0 to {self.processes - 1} of processes = {self.processes}")
        return self

    def check(self, experiment: Any) -> None:
        """Raises ValueError for other sections of an Experiment that do not go with it."""
        if self.weights == "spread" and experiment.adapter is None:
            raise ValueError(
                "mesh.weights = spread is of frozen weights, and without an adapter all are trained: expected whole (with "
                "mesh.moments=spread for the optimizer's state) or experts, or adapter: {}"
            )
        if self.weights == "spread" and experiment.placement.experts not in ("device", "auto"):
            raise ValueError(
                f"placement.experts = {experiment.placement.experts} with mesh.weights = spread: each device would fetch a part of every "
                "matrix and then wait for the others': expected mesh.weights=experts or whole, or placement.experts=device"
            )
        if self.devices is not None:
            self.check_rows(self.devices, experiment)

    def check_rows(self, devices: int, experiment: Any) -> None:
        """Raises ValueError for rows of a batch that this many devices do not divide."""
        rows, apart = experiment.data.batch_rows, experiment.preference is not None and experiment.data.batching != "pack"
        multiple = devices * 2 if apart else devices
        if rows % multiple:
            sides = ", the two sides of a pair on one" if apart else ""
            raise ValueError(
                f"data.batch_rows = {rows} are of all {devices} devices together{sides}, and do not divide: expected "
                f"{_either(rows // multiple * multiple, -(-rows // multiple) * multiple)}"
            )

    def check_experts(self, devices: int, experts: int) -> None:
        """Raises ValueError for experts that this many devices do not divide, where each is to hold its own ones."""
        if self.weights == "experts" and experts % devices:
            fits = [count for count in range(1, experts + 1) if experts % count == 0]
            below, above = max(c for c in fits if c < devices), min((c for c in fits if c > devices), default=0)
            raise ValueError(
                f"mesh.weights = experts: {experts} experts over {devices} devices do not divide: expected "
                f"mesh.devices={_either(below, above)}, or mesh.weights=spread"
            )


def _either(below: int, above: int) -> str:
    return " or ".join(str(number) for number in (below, above) if number)
