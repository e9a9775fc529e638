"""What a run needs of its device, said before anything is loaded."""

from __future__ import annotations

from typing import Any

from moejax.config import Experiment
from moejax.errors import UserError

OLDEST_WITH_BF16 = (8, 0)


def check(experiment: Experiment, device: Any) -> None:
    """device: a jax device. Raises UserError for a GPU that cannot compute what the experiment asks for, and says what would work.

    Before compute capability 8.0 (Ampere) a GPU has no bf16 products: XLA would compute them in fp32, with every weight and activation
    converted on the way, and a run would be slow without a word.
    """
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not capability[:1].isdigit():  # AMD's are names
        return
    t = experiment.training
    asked = {name: getattr(t, name) for name in ("compute_dtype", "param_dtype")}
    wrong = [f"training.{name} = {dtype}" for name, dtype in asked.items() if dtype.startswith("bfloat16")]
    if wrong and tuple(int(part) for part in capability.split(".")[:2]) < OLDEST_WITH_BF16:
        raise UserError(
            f"{device.device_kind} has compute capability {capability}, and {' and '.join(wrong)} needs 8.0 (A100, A40, RTX 30 or newer): "
            "set training.compute_dtype=float32 training.param_dtype=float32 (about twice the memory of activations), or use a newer GPU"
        )
