"""What the compiled step takes, beside what the device has: an out-of-memory is said before it happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from moejax.errors import UserError
from moejax.estimator.units import counted


def compiler_peak_bytes(compiled: Any) -> int:
    """Peak memory of a compiled program, arguments included, by the compiler itself.

    The GPU compiler gives it; the CPU one leaves temporaries out of its peak, so there it is added up.
    """
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return max(total, int(getattr(m, "peak_memory_in_bytes", 0) or 0)) if _on_cpu(compiled) else m.peak_memory_in_bytes


def _on_cpu(compiled: Any) -> bool:
    devices = {d.platform for s in jax.tree.leaves(compiled.input_shardings) for d in s.device_set}
    return devices == {"cpu"}


def check(compiled: Any, rows: int, compile_rows: Callable[[int], Any], limit: int | None) -> int:
    """The compiler's peak in bytes. Raises UserError with the batch that would fit, if it exceeds `limit` bytes.

    compile_rows: compiles the same step for another number of rows. Peak memory is nearly affine in the rows: two compiles give
    the largest batch that fits.
    """
    peak = compiler_peak_bytes(compiled)
    if limit is None or peak <= limit:
        return peak
    fits = 0
    if rows > 1:
        fewer = max(1, rows // 2)
        half = compiler_peak_bytes(compile_rows(fewer))
        slope = (peak - half) / (rows - fewer)
        fits = max(0, min(rows - 1, int((limit - (half - slope * fewer)) // slope))) if slope > 0 else 0
    advice = (
        f"data.batch_rows={fits} would fit"
        if fits
        else "not even one row fits: use a shorter data.row_tokens or a larger device"
    )
    raise UserError(
        f"out of memory: the step asks for {peak / 1e9:.2f} GB with {counted(rows, 'row')}, {limit / 1e9:.2f} GB are usable on "
        f"{jax.local_devices()[0].device_kind}; {advice} (keep the batch by training.gradient_accumulation)"
    )
