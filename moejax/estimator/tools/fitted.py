"""A tool's seconds with their interval, and how far to trust them: forms fitted to receipts, with receipts left out. No jax.

The interval is conformal: nine of ten receipts lie within it when they, or all of their card or model, are left out of the fit. Which of
them counts follows from what is asked: a card or a model without a receipt of that tool gets the errors of cards and models left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moejax.estimator.least_squares import FloatArray
from moejax.estimator.receipts import Receipt, contradictions
from moejax.estimator.tools import forms, work
from moejax.estimator.tools.forms import FORM, Form, Law
from moejax.estimator.tools.work import Recipe
from moejax.gpus import GPU

LEVEL = 0.9
NOVEL = ("neither", "card", "model", "both")
"""What of a question no receipt of its tool has: the keys of `left_out`."""
_SAME: dict[str, Callable[[Recipe, Recipe], bool]] = {
    "card": lambda a, b: a.gpu == b.gpu,
    "model": lambda a, b: a.model == b.model,
    "both": lambda a, b: a.gpu == b.gpu or a.model == b.model,
}


@dataclass(frozen=True)
class Estimate:
    """Seconds of an optimizer step. novel: what the interval was widened for, of `NOVEL`; basis: from which receipts, in words."""

    seconds: float
    interval: tuple[float, float]
    novel: str
    basis: str


@dataclass(frozen=True)
class Points:
    """Receipts with seconds, as they are fitted: recipes and cards, counts, measured seconds [points], ids."""

    recipes: tuple[Recipe, ...]
    works: tuple[work.Work, ...]
    seconds: FloatArray
    receipts: tuple[Receipt, ...]

    def __len__(self) -> int:
        return len(self.recipes)

    def without(self, out: Collection[int]) -> Points:
        left = [i for i in range(len(self)) if i not in out]
        return Points(
            tuple(self.recipes[i] for i in left), tuple(self.works[i] for i in left), self.seconds[left],
            tuple(self.receipts[i] for i in left),
        )  # fmt: skip

    def fit(self, form: Form = FORM) -> Law:
        return forms.fit(form, self.recipes, self.works, self.seconds)

    def ratios(self, law: Law, of: Sequence[int]) -> FloatArray:
        """Logarithm of predicted over measured."""
        recipes = [self.recipes[i] for i in of]
        return np.log(law.seconds(recipes, [_card(r) for r in recipes]) / self.seconds[list(of)])

    def left_out(self, novel: str, form: Form = FORM) -> FloatArray:
        """`ratios` of each, by a fit without it, or without all of its tool's with its card, its model, or either."""
        same, laws, found = _SAME.get(novel), {}, []
        for i, mine in enumerate(self.recipes):
            others = range(len(self))
            out = {i} if same is None else {j for j in others if mine.tool == self.recipes[j].tool and same(mine, self.recipes[j])}
            key = frozenset(out)
            if key not in laws:
                laws[key] = self.without(out).fit(form)
            found.append(self.ratios(laws[key], [i])[0])
        return np.array(found)

    def novel(self, recipe: Recipe, gpu: GPU) -> str:
        own = [r for r in self.recipes if r.tool == recipe.tool]
        card, model = any(_card(r) == gpu for r in own), any(r.model == recipe.model for r in own)
        return NOVEL[(not card) + 2 * (not model)]


def points(every: Sequence[Receipt], table: dict[str, GPU]) -> Points:
    """Of all receipts those that can be fitted."""
    found = [(receipt, work.of_receipt(receipt, every, table)) for receipt in every if receipt.step_seconds and receipt.rows]
    known = [(receipt, recipe) for receipt, recipe in found if recipe is not None and recipe.gpu is not None]
    recipes = tuple(recipe for _, recipe in known)
    seconds = np.array([receipt.step_seconds or 0.0 for receipt, _ in known])
    return Points(recipes, tuple(work.work(r, _card(r)) for r in recipes), seconds, tuple(receipt for receipt, _ in known))


def _card(recipe: Recipe) -> GPU:
    assert recipe.gpu is not None
    return recipe.gpu


def half_width(ratios: FloatArray, level: float = LEVEL) -> float:
    """The conformal one of this many errors: of n the ceil((n + 1) · level)-th smallest."""
    ordered = np.sort(np.abs(ratios))
    return float(ordered[min(len(ordered), math.ceil((len(ordered) + 1) * level)) - 1])


@dataclass(frozen=True)
class Fitted:
    """The chosen form, fitted to all receipts."""

    points: Points

    @cached_property
    def law(self) -> Law:
        return self.points.fit()

    @cached_property
    def _widths(self) -> dict[str, float]:
        return {}

    def width(self, novel: str) -> float:
        """Half of the interval's logarithm. Never narrower for what is less known."""
        if novel not in self._widths:
            own = half_width(self.points.left_out(novel))
            self._widths[novel] = own if novel == "neither" else max(own, self.width("neither"))
        return self._widths[novel]

    def estimate(self, recipe: Recipe, gpu: GPU) -> Estimate:
        novel = self.points.novel(recipe, gpu)
        seconds = float(self.law.seconds([recipe], [gpu])[0])
        half = self.width(novel) + self._contradicted(recipe, gpu)
        return Estimate(seconds, (seconds * math.exp(-half), seconds * math.exp(half)), novel, self._basis(recipe, gpu, novel))

    def _contradicted(self, recipe: Recipe, gpu: GPU) -> float:
        """Half the logarithm between receipts of one recipe of this tool, model and card that differ."""
        key = recipe.tool, recipe.model, gpu.name, recipe.in_host
        groups = contradictions(self.points.receipts)
        mine = [g for g in groups if (g[0].tool_name, g[0].model, g[0].gpu, g[0].experts_in == "host RAM") == key]
        spans = [[float(r.step_seconds or 1) for r in group] for group in mine]
        return max((math.log(max(s) / min(s)) / 2 for s in spans), default=0.0)

    def _basis(self, recipe: Recipe, gpu: GPU, novel: str) -> str:
        own = [r for r in self.points.recipes if r.tool == recipe.tool]
        told = f"{len(own)} receipts of {recipe.tool} on {len({_card(r).name for r in own})} cards"
        lacks = {"card": gpu.name, "model": recipe.model, "both": f"{gpu.name}, and none of {recipe.model}"}
        if novel == "neither":
            return f"{told}, this card and this model among them"
        return f"{told}, none {'on' if novel != 'model' else 'of'} {lacks[novel]}: the interval is the spread between cards and models"


@dataclass(frozen=True)
class Score:
    """Of a form: medians of |predicted/measured - 1|, fitted and with receipts left out; mean of |logarithm| when each is left out."""

    form: str
    fitted: float
    left_out: float
    mean: float
    card: float
    model: float


def score(data: Points, form: Form) -> Score:
    def median(ratios: FloatArray) -> float:
        return float(np.median(np.abs(np.expm1(ratios))))

    alone = data.left_out("neither", form)
    others = [median(data.left_out(novel, form)) for novel in ("card", "model")]
    return Score(form.name, median(data.ratios(data.fit(form), range(len(data)))), median(alone), float(np.mean(np.abs(alone))), *others)


def held(data: Points) -> list[tuple[str, float, tuple[float, float]]]:
    """(receipt, measured seconds, its interval) of each, by all the others alone: law, width and what is novel."""
    found = []
    for i, recipe in enumerate(data.recipes):
        rest = Fitted(data.without({i}))
        told = rest.estimate(recipe, _card(recipe))
        found.append((data.receipts[i].id, float(data.seconds[i]), told.interval))
    return found
