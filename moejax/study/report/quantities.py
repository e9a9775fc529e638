"""How numbers are rounded for reading. The exact one always stays next to it."""

from __future__ import annotations

_SECONDS = (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))
BARE = (
    "", "1", "1 or 0", "queries", "queries/s", "tokens", "tokens/s", "tokens/query", "(tokens/query)^2", "steps", "USD/h", "h", "points",
    "tokens/GB",
)  # fmt: skip
_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def rounded(value: float, unit: str = "") -> str:
    """Three significant digits and a unit of a fitting size: (0.000358, "s") is "358 µs". "share" becomes percent.

    Whole numbers are not rounded. Units that a table's head or a line's name says (`BARE`) are left out.
    """
    if unit in BARE:
        return digits(value)
    unit = {"bytes": "B", "USD": "$"}.get(unit, unit)
    if unit == "share":
        return f"{digits(100 * value)} %"
    if unit == "s":
        return _scaled(value, _SECONDS[2:] if abs(value) < 600 else _SECONDS)
    if unit == "B":
        return _scaled(value, _BYTES)
    if unit == "$":
        return f"${digits(value)}" if abs(value) < 1 else f"${value:,.2f}" if abs(value) < 100 else f"${value:,.0f}"
    return f"{digits(value)} {unit}".rstrip()


def digits(value: float) -> str:
    """Three significant digits; a whole number in full."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.0f}"


def _scaled(value: float, scales: tuple[tuple[str, float], ...]) -> str:
    if value == 0:
        return f"0 {next(name for name, scale in scales if scale == 1.0)}"
    for name, scale in scales:
        # 999.6 ms rounds to 1000 ms: a unit too small by then
        if abs(value) >= scale * 0.9995:
            return f"{digits(value / scale)} {name}"
    name, scale = scales[-1]
    return f"{digits(value / scale)} {name}"
