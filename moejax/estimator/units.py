"""Numbers as people read them."""


class Gigabytes(float):
    """A number of GB for a column of GB: `f"{x}"` has three decimals, and below 0.1 GB it is reported in MB."""

    def __format__(self, form: str) -> str:
        return float(self).__format__(form) if form else f"{1000 * self:.3g} MB" if 0 < abs(self) < 0.1 else f"{float(self):.3f}"


def gigabytes(size: float) -> Gigabytes:
    """Of this many bytes."""
    return Gigabytes(size / 1e9)


def told(size: float) -> str:
    """`23.35 GB`, `78.2 MB`: a size in a sentence."""
    if size >= 0.1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.3g} MB" if size >= 1e4 else f"{size:.0f} bytes"


def counted(number: float, one: str, many: str | None = None) -> str:
    """`1 epoch`, `10 epochs`, `1,000 queries`."""
    return f"{number:,.10g} {one if number == 1 else many or one + 's'}"
