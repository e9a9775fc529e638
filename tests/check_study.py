"""Whether all trials of a study ended, every kind of result is there, and its page is whole: python tests/check_study.py DIR"""

import sys
from pathlib import Path

from support import EXPERIMENTS

from moejax.study.report import results

folder = Path(sys.argv[1])
found = results.read(folder)
failed = {name: trial for name, trial in found.trials.items() if trial.status != "done"}
missing = set(EXPERIMENTS) - {row.experiment for row in found.rows}
if not found.finished or failed or missing or "</html>" not in (folder / "report.html").read_text(encoding="utf-8"):
    sys.exit(f"{folder}: not whole: failed {failed}, without a result: {missing}")
print(f"{folder}: {len(found.trials)} trials, {len(found.rows)} values, nothing failed")
