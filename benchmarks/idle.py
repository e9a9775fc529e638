"""How long the device waits between steps: the share of a run's time in which no step was under way.

    python benchmarks/idle.py [--config configs/demo.yaml configs/bench_mixtral_tiny.yaml] [--steps 60] [--out FILE.json] [key.sub=value …]

The real loop of train.py, in a folder that is thrown away. A thread waits for each step's result and notes when it came; the device waited
from then until the next step was handed to it (not at all if it had been before). Steps that had a compilation, an evaluation or a
checkpoint between them are told apart: there the run has other work.
"""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import kept

from moejax import config as configuration
from moejax.device import cpu_name
from moejax.errors import UserError
from moejax.training import loop
from moejax.training.loop import Trainer

WARM_UP = 2


class Watch:
    """Notes when each step was handed over and when its result was there. Stands in the place of the loop's compiled step."""

    def __init__(self) -> None:
        self.sent: list[float] = []
        self.done: list[float] = []
        self.other: set[int] = set()  # steps before which the loop had other work
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        while (result := self._results.get()) is not None:
            jax.block_until_ready(result)
            self.done.append(time.perf_counter())

    def step(self, compiled: Any) -> Any:
        def run(*arguments: Any) -> Any:
            self.sent.append(time.perf_counter())
            state, metrics = compiled(*arguments)
            self._results.put(metrics["grad_norm"])
            return state, metrics

        return run

    def close(self) -> None:
        self._results.put(None)
        self._thread.join()


def watched(watch: Watch) -> type[Trainer]:
    """The run's own trainer, under watch."""

    class Watched(Trainer):
        def _compile(self, batch: Any) -> Any:
            if batch.tokens.shape not in self._met:
                watch.other.add(len(watch.sent))
            return watch.step(super()._compile(batch))

        def _finish(self, pending: Any, display: Any) -> None:
            super()._finish(pending, display)
            if pending.step == self.step:  # waited for at once: an evaluation or a checkpoint follows
                watch.other.add(len(watch.sent))

    return Watched


def gaps(watch: Watch) -> dict[str, float]:
    """Seconds in which no step was under way, and of the whole, from the third step on."""
    idle = around = 0.0
    for n in range(WARM_UP, len(watch.done)):
        waited = max(0.0, watch.sent[n] - watch.done[n - 1])
        if n in watch.other:
            around += watch.done[n] - watch.done[n - 1]
        else:
            idle += waited
    whole = watch.done[-1] - watch.done[WARM_UP - 1] - around
    return {"steps": len(watch.done) - WARM_UP, "seconds": whole, "idle_seconds": idle, "idle_share": idle / whole}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", nargs="+", default=["configs/demo.yaml", "configs/bench_mixtral_tiny.yaml"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    options = parser.parse_intermixed_args()
    device = jax.local_devices()[0]
    report = kept.about(device=cpu_name() if device.platform == "cpu" else device.device_kind, runs={})
    plain = loop.Trainer
    try:
        for path in options.config:
            watch = Watch()
            loop.Trainer = watched(watch)  # type: ignore[misc]
            with tempfile.TemporaryDirectory() as folder:
                own = [f"runs_dir={folder}", f"training.steps={options.steps}", "training.warmup_steps=0"]
                code = loop.run(configuration.load(path, [*own, *options.overrides]), resume=False, keep=False)
            watch.close()
            if code:
                return code
            report["runs"][path] = gaps(watch)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        loop.Trainer = plain  # type: ignore[misc]
    for path, found in report["runs"].items():
        print(
            f"{path}: the device waited {100 * found['idle_share']:.2f} % of {found['seconds']:.1f} s in {found['steps']} steps"
        )
    kept.write(options.out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
