"""What arXiv 2408.04693 published, as the estimator answers with it by default. `python -m moejax.study.publish` writes these files.

coefficients.json: a step's time, fitted to its curves (`estimator/coefficients.py`). lengths.json: its data sets' queries by tokens.
batches.json: by model, equation 1's coefficients and the largest batches that it ran.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@cache
def read(name: str) -> dict[str, Any]:
    """lengths.json, batches.json or program.json as it is."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))
