"""Which kernel, or what in its place, ran how often: reported at a run's end, by the same rules that the model chooses with."""

from __future__ import annotations

from collections import Counter
from typing import Any

from moejax.config import Experiment
from moejax.models.config import Architecture, specs
from moejax.models.ops import choice, flash
from moejax.training import experts


class Engaged:
    """Counted by step. passes: (operation, form) -> forward passes of a layer over a micro-batch."""

    def __init__(self, experiment: Experiment, config: Architecture, platform: str | None = None):
        self._experiment, self._config, self._platform = experiment, config, platform or choice.here()
        self.passes: Counter[tuple[str, str]] = Counter()
        self.fallbacks: dict[tuple[str, str], str] = {}

    def step(self, micro: int, rows: int, length: int) -> None:
        """One optimizer step of so many micro-batches."""
        times = micro // self._experiment.training.together
        several = 1 if self._experiment.mesh is None else self._experiment.mesh.devices or 1
        rows = max(1, rows // several)
        if layers := len(self._config.expert_layer_numbers):
            plan = experts.plan(self._experiment, self._config, rows * length)
            self.passes["experts", "dense" if plan is None else plan.backend] += times * layers
        for stack in self._config.stacks:
            mixer: Any = stack.block.mixer
            if isinstance(mixer, specs.Mamba):
                shape = rows * self._experiment.training.together, length, mixer.inner
                self.passes["selective scan", choice.scan(self._platform, *shape, self._experiment.model.scan)[0]] += times * stack.repeats
            elif hasattr(mixer, "head_dim"):
                self._attention(mixer, length, times * stack.repeats)

    def _attention(self, mixer: Any, length: int, passes: int) -> None:
        asked, dtype = self._experiment.model.attention, self._experiment.training.compute_dtype
        lacking = experts.lacking(mixer)
        why = flash.why_blocks(asked, self._platform, dtype, mixer.head_dim, length, lacking)
        ran = "attention", "flash" if why is None else "blocks"
        self.passes[ran] += passes
        if why not in (None, lacking, flash.MEASURED) and asked == "auto" and self._platform != "cpu":  # the model's own: said at start
            self.fallbacks[ran] = why

    def report(self) -> list[str]:
        """A line of what ran; none before the first step."""
        ran = [f"{operation} {form} {passes:,} times" for (operation, form), passes in self.passes.items()]
        return [f"layers' passes: {', '.join(ran)}"] if ran else []

    def warnings(self) -> list[str]:
        """Of what ran in a kernel's place though nobody asked for it."""
        return [
            f"warning: {operation} ran by {form} in place of flash attention, {self.passes[operation, form]:,} times at most: {why}. "
            f"model.{operation}={form} says that it is meant"
            for (operation, form), why in self.fallbacks.items()
        ]
