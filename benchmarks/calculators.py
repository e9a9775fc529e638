"""Peak memory by other calculators and by this estimator, next to published peaks (`estimate.py receipts`): the table of docs/estimator.md.

    python benchmarks/calculators.py

Other calculators' rules are those of their pages, nothing of theirs runs here: accelerate counts weights alone (int4: half a byte each);
Unsloth's requirements page and LLaMA-Factory's README have a figure for a size of model. Ours for a receipt is made by all other receipts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from moejax import gpus
from moejax.estimator import receipts
from moejax.estimator.tools import peak
from moejax.models.config import PRESETS

SHOWN = ("tc2-unsloth", "tc2-e4b-dq", "tc1-unsloth-5090", "tc1-e4b-5090", "tc2-e4b-offload", "tc3-e4b-offload-4090", "olmoe-unsloth")
UNSLOTH = {3: 3.5, 7: 5, 8: 6, 9: 6.5, 11: 7.5, 14: 8.5, 27: 22, 32: 26, 40: 30, 70: 41, 81: 48, 90: 53, 405: 237}
"""GB for QLoRA by billions of parameters, as printed on https://unsloth.ai/docs/get-started/fine-tuning-for-beginners/unsloth-requirements."""
LLAMA_FACTORY = {"mixtral-8x7b": 32}
"""QLoRA, 4 bit, of the README's table of January 2024, which had a column for it."""


def rows() -> list[tuple[str, float, float, float, float | None, float]]:
    """(receipt, measured, this, Unsloth's page, LLaMA-Factory's, accelerate's), GB."""
    found = peak.peaks(receipts.shipped(), gpus.GPUS)
    predicted = np.exp(found.left_out()) * found.measured
    table = []
    for receipt, measured, ours in zip(found.receipts, found.measured, predicted, strict=True):
        if receipt.id in SHOWN:
            billions = PRESETS[receipt.model].parameters[0] / 1e9
            nearest = UNSLOTH[min(UNSLOTH, key=lambda size: abs(size - billions))]
            table.append((receipt.id, float(measured), float(ours), nearest, LLAMA_FACTORY.get(receipt.model), billions / 2))
    return table


def main() -> None:
    print("| receipt | measured | this, by the others | Unsloth's page | LLaMA-Factory's table | accelerate, int4 |")
    print("|---|---|---|---|---|---|")
    for name, measured, *others in rows():
        cells = ["–" if gb is None else f"{gb:.1f} ({gb / measured - 1:+.0%})" for gb in others]
        print(f"| {name} | {measured:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
