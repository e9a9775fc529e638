"""Bytes as people read them."""


class Gigabytes(float):
    """A number of GB for a column of GB: `f"{x}"` has three decimals, and below 0.1 GB it is told in MB."""

    def __format__(self, form: str) -> str:
        return float(self).__format__(form) if form else f"{1000 * self:.3g} MB" if 0 < abs(self) < 0.1 else f"{float(self):.3f}"


def gigabytes(size: float) -> Gigabytes:
    """Of so many bytes."""
    return Gigabytes(size / 1e9)
