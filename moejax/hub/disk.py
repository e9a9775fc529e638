"""Whether a disk holds what is about to be written: asked before anything is fetched."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moejax.errors import UserError
from moejax.files import nearest


class Need(NamedTuple):
    """Of this many bytes in a folder, which may not be there yet. elsewhere: what sets another folder."""

    what: str
    nbytes: int
    folder: Path
    elsewhere: str


def told(needs: Sequence[Need]) -> str:
    """What is written where, and what is free there. Raises UserError where that does not suffice: folders of one disk count together."""
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(nearest(need.folder).stat().st_dev, []).append(need)
    lines = []
    for several in disks.values():
        free, whole = shutil.disk_usage(nearest(several[0].folder)).free, sum(need.nbytes for need in several)
        parts = " and ".join(f"{size(need.nbytes)} of {need.what} in {need.folder}" for need in several)
        lines.append(f"{parts}{f', together {size(whole)}' if len(several) > 1 else ''}; {size(free)} free")
        if whole > free:
            remedies = ", ".join(dict.fromkeys(need.elsewhere for need in several))
            raise UserError(f"the disk is too small: {lines[-1]}. Make room there, or set {remedies}")
    return f"disk: {'; '.join(lines)}"


def size(nbytes: int) -> str:
    """`23.35 GB`, `78.2 MB`."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 0.1e9 else f"{nbytes / 1e6:.3g} MB"
