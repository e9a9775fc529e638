"""What joins cards to each other and to the host, and what of it a collective reaches (links.json, with sources). No jax."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from moejax import tpus
from moejax.errors import UserError
from moejax.gpus import GPU

SHARE = 0.8
"""Of a link's rate in one direction, what large collectives and copies reach: NCCL's all-gather 360 of an H100's 450 GB/s (NVIDIA's own
expectation, github.com/NVIDIA/nccl-tests issue 326). On a system of yours: nccl-tests, busbw."""


@dataclass(frozen=True)
class Link:
    """bytes_per_second: in one direction, by its sheet. joins: cards at most. cards: those that have it; none: PCIe, which each has."""

    name: str
    bytes_per_second: float
    joins: int | None
    cards: tuple[str, ...]
    source: str

    @property
    def rate(self) -> float:
        """Bytes/s that a card receives in a collective."""
        return SHARE * self.bytes_per_second


def _read() -> dict[str, Link]:
    table = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {
        row["name"]: Link(row["name"], row["gb_per_second"] * 1e9, row.get("joins"), tuple(row.get("cards", ())), row["source"])
        for row in table
    }


LINKS: dict[str, Link] = _read()


def several(card: str, devices: int) -> str:
    """`2 x L4`; of a TPU's chips `v5e-8`, `v5p-8`."""
    if card in tpus.CHIPS:
        return tpus.of(tpus.CHIPS[card], devices).name
    return card if devices == 1 else f"{devices} x {card}"


def given(gb_per_second: float) -> Link:
    """A link of which is known what collectives reach (nccl-tests' busbw). Raises UserError for what cannot be meant."""
    if not 0.01 <= gb_per_second <= 10_000:
        raise UserError(f"--link {gb_per_second:g}: expected GB/s that a card receives, e.g. 20 (nccl-tests, busbw)")
    return Link(f"{gb_per_second:g} GB/s", gb_per_second * 1e9 / SHARE, None, (), "as given")


def pcie(gpu: GPU) -> Link:
    """A card's own link to the host, by its lanes."""
    link = LINKS[f"PCIe {gpu.pcie}"]
    return Link(f"{link.name} x{gpu.pcie_lanes}", link.bytes_per_second * gpu.pcie_lanes / 16, link.joins, (), link.source)


def between(gpu: GPU, devices: int) -> Link:
    """The link that this many of these cards work over: the fastest that joins them all in one machine; of more than that, the network's
    ports of a machine together, or what joins its cards, whichever is slower. Raises UserError where no network is known of the card.

    In a ring over machines each brings its cards' parts over all its ports at once, and each card gets them over the link inside.
    """
    own = sorted((link for link in LINKS.values() if gpu.name in link.cards and link.joins), key=lambda link: -link.bytes_per_second)
    inside = next((link for link in (*own, pcie(gpu)) if link.joins and link.joins >= devices), None)
    if inside is not None:
        return inside
    network = next((link for link in LINKS.values() if gpu.name in link.cards and link.joins is None), None)
    if network is None:
        raise UserError(f"{devices} x {gpu.name}: no network of this card's machines is known here: --link GB/s says what a card receives")
    inside = own[0]
    assert inside.joins is not None
    ports = inside.joins * network.bytes_per_second
    return Link(f"{network.name}, {inside.joins} ports a machine", min(ports, inside.bytes_per_second), None, (), network.source)
