"""What an hour of a GPU costs: dated and with its seller. A price without a day is a rumour.

One GPU's price spreads more than fourfold between sellers: look at the price before looking at the model's error.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moejax import tpus
from moejax.documents import read_text
from moejax.errors import UserError
from moejax.gpus import GPU, GPUS, find


@dataclass(frozen=True)
class Price:
    """USD per GPU-hour. `gpus_rented`: how many GPUs the instance has that has to be rented; the price is one GPU's share of it. What costs
    nothing is lent as a whole: for runs on as many. `hours_per_week`: for how long; None: as long as one pays, or not stated."""

    gpu: str
    usd_per_hour: float
    seller: str
    day: str
    spot: bool = False
    gpus_rented: int = 1
    hours_per_week: float | None = None

    @property
    def told(self) -> str:
        """`1.67 USD/h, CUDO, 2024`: how a price is printed wherever dollars are."""
        if self.usd_per_hour == 0:
            limit = "hours not stated" if self.hours_per_week is None else f"{self.hours_per_week:g} h a week"
            return f"free, {limit}, {self.seller}, {self.day}"
        spot = ", spot" if self.spot else ""
        share = f", 1 of {self.gpus_rented} GPUs" if self.gpus_rented > 1 else ""
        return f"{dollars(self.usd_per_hour)} USD/h, {self.seller}{spot}{share}, {self.day}"


def weeks(price: Price | None, hours: float) -> str | None:
    """How long a run of this many hours takes on what is lent for some hours a week; None of other prices."""
    if price is None or price.hours_per_week is None:
        return None
    count = math.ceil(hours / price.hours_per_week)
    lent = f"{price.seller}'s {price.hours_per_week:g} h"
    return f"{hours:,.3g} h are {count:,} week{'' if count == 1 else 's'} of {lent} (--resume continues)"


def dollars(usd_per_hour: float) -> str:
    """2.10; a third decimal where there is one: 2.745."""
    return f"{usd_per_hour:,.3f}".removesuffix("0")


_SKYPILOT = ("InstanceType", "AcceleratorName", "AcceleratorCount", "Region", "Price", "SpotPrice")
_SIMPLE = ("gpu", "usd_per_hour")


def load(name_or_file: str, gpus: dict[str, GPU] | None = None) -> tuple[Price, ...]:
    """A set by name ("study", "2026"), or a CSV file of a user's, by SkyPilot's columns or by our own:
    `gpu,usd_per_hour[,seller][,day][,spot][,gpus_rented][,hours_per_week]`; of a TPU its chip, `v5e`.

    Rows of GPUs that the table does not know are left out of a catalog, and are mistakes in a simple file. Raises UserError for
    missing columns, another currency, or values that are not prices.
    """
    if name_or_file in SETS:
        return SETS[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"--prices {path} {what}: expected a CSV file, or one of {', '.join(SETS)}")
    return _read(path, GPUS if gpus is None else gpus)


def _read(path: Path, gpus: dict[str, GPU]) -> tuple[Price, ...]:
    text = read_text(path, "--prices ")
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        rows = list(reader)
        columns = [c.strip() for c in reader.fieldnames or ()]
    except csv.Error as error:
        raise UserError(f"--prices {path}, line {max(reader.line_num, 1)}: broken CSV: {error}") from error
    rows = [{(k or "").strip(): (v or "").strip() if isinstance(v, str) else "" for k, v in row.items()} for row in rows]
    day = f"file of {datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()}"
    catalog = "AcceleratorName" in columns or "InstanceType" in columns
    _check(path, columns, rows, _SKYPILOT if catalog else _SIMPLE)
    found = tuple((_catalog if catalog else _simple)(path, rows, day, gpus))
    if not found:
        raise UserError(f"--prices {path}: no row has a price of a GPU of {', '.join(gpus)}")
    return found


def _check(path: Path, columns: list[str], rows: list[dict[str, str]], needed: tuple[str, ...]) -> None:
    foreign = [c for c in columns if c.lower().endswith("_per_hour") and not c.lower().startswith("usd")]
    if foreign:
        raise UserError(f"--prices {path}: column {foreign[0]} is not in US dollars: convert it and name it usd_per_hour")
    currencies = {row[c].upper() for row in rows for c in columns if c.lower() == "currency"} - {"USD", ""}
    if currencies:
        raise UserError(f"--prices {path}: currency {', '.join(sorted(currencies))}: convert the prices to USD first")
    missing = [c for c in needed if c not in columns]
    if missing:
        there = ", ".join(columns)[:200] or "none"
        raise UserError(
            f"--prices {path}: column{'s' * (len(missing) > 1)} {', '.join(missing)} missing (it has {there}); "
            f"expected SkyPilot's {','.join(_SKYPILOT)} or {','.join(_SIMPLE)}[,seller][,day][,spot]"
        )


def _amount(path: Path, line: int, column: str, text: str, *, may_be_0: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or (value == 0 and not may_be_0):
        raise UserError(f"--prices {path}, line {line}: {column} = {text[:40]!r}: expected US dollars, a number above 0 without a sign")
    return value


def _simple(path: Path, rows: list[dict[str, str]], day: str, gpus: dict[str, GPU]) -> Iterable[Price]:
    for line, row in enumerate(rows, 2):
        usd = _amount(path, line, "usd_per_hour", row["usd_per_hour"], may_be_0=True)
        spot = row.get("spot", "").lower() in ("1", "true", "yes")
        try:
            gpu = tpus.CHIPS.get(row["gpu"]) or find(row["gpu"], gpus)
        except UserError as error:
            raise UserError(f"--prices {path}, line {line}: {error}") from None
        rented = round(_amount(path, line, "gpus_rented", row.get("gpus_rented") or "1"))
        lent = row.get("hours_per_week")
        hours = _amount(path, line, "hours_per_week", lent) if lent else None
        yield Price(gpu.name, usd, row.get("seller") or path.stem, row.get("day") or day, spot, max(1, rented), hours)


def _catalog(path: Path, rows: list[dict[str, str]], day: str, gpus: dict[str, GPU]) -> Iterable[Price]:
    for line, row in enumerate(rows, 2):
        if not row["AcceleratorName"]:
            continue  # an instance without accelerators
        try:
            gpu = find(row["AcceleratorName"], gpus)
        except UserError:
            continue  # TPUs, Inferentia, GPUs that nobody fine-tunes on
        count = max(1, round(_amount(path, line, "AcceleratorCount", row["AcceleratorCount"])))
        seller = " ".join(part for part in (path.stem, row["InstanceType"], row["Region"]) if part)
        for column, spot in (("Price", False), ("SpotPrice", True)):
            if row[column] and row[column].lower() != "nan":
                yield Price(gpu.name, _amount(path, line, column, row[column]) / count, seller, day, spot, count)


# The study read CUDO Compute's prices in 2024; it names no day. The others: on demand, from the sellers' public price lists on the day
# named; of AWS and Azure one GPU's share of the instance. TPUs: a chip in us-central1, by SkyPilot's catalog v9 (gcp/vms.csv, July 2026).
# Of 2026-08-22: a daily reading of those pages (github.com/adriannutiu/gpu-rental-prices, data/snapshots).
# What is lent: Kaggle's v5e-8 for 20 hours a week as its users report, Colab's v5e-1 (github.com/jax-ml/jax-ai-stack pull 242).
SETS = {name: _read(Path(__file__).with_name(f"prices_{name}.csv"), GPUS) for name in ("study", "2026")}
STUDY, DATED = SETS.values()


OLD_DAYS = 60


def old(prices: Iterable[Price], name: str, today: datetime.date | None = None) -> list[str]:
    """A line where the newest of a set's prices is older than `OLD_DAYS` days; a user's file without days is as old as it is."""
    days = [day for price in prices if price.usd_per_hour and (day := _day(price)) is not None]
    age = ((today or datetime.date.today()) - max(days)).days if days else 0
    if age <= OLD_DAYS:
        return []
    return [f"warning: the newest price in {name} is of {max(days)}, {age} days ago: --prices FILE brings today's"]


def aged(price: Price, today: datetime.date | None = None) -> str:
    """` (91 days old)` of a price older than `OLD_DAYS`; "" of a newer one, and of one without a day."""
    day = _day(price)
    age = 0 if day is None else ((today or datetime.date.today()) - day).days
    return f" ({age} days old)" if age > OLD_DAYS else ""


def _day(price: Price) -> datetime.date | None:
    """Of a month its first; None of what is neither."""
    text = price.day.removeprefix("file of ")
    try:
        return datetime.date.fromisoformat(text if len(text) > len("2026-06") else f"{text}-01")
    except ValueError:
        return None


def cheapest(prices: Iterable[Price], gpu: str, *, spot: bool = False, devices: int = 1) -> Price | None:
    """The lowest price of this GPU, or None. With `spot`, spot prices only: they are another good. What is free for as many goes first,
    then instances of one GPU."""
    offers = [p for p in prices if p.gpu == gpu and p.spot == spot and (p.usd_per_hour > 0 or p.gpus_rented == devices)]
    return min(offers, key=lambda p: (p.usd_per_hour > 0, p.gpus_rented > 1, p.usd_per_hour), default=None)


def without(gpus: Iterable[str], name_or_file: str, *, spot: bool = False) -> list[str]:
    """A line that names the GPUs without a price in this set or file, and the sets that have one; none where all have one."""
    told = []
    for gpu in dict.fromkeys(gpus):
        sets = [key for key, offers in SETS.items() if cheapest(offers, gpu) and key != name_or_file]
        told.append(f"{gpu} (--prices {sets[0]} has one)" if sets and not spot else gpu)
    kind, column = ("spot price", " with SpotPrice") if spot else ("price", "")
    return [f"no {kind} known in {name_or_file}: {', '.join(told)}; --prices FILE{column} brings your own"] if told else []
