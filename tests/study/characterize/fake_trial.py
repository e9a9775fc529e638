"""fake_trial.py CONTROL DIR TRIAL [--rows N] --parent PID: writes what a trial would, without measuring.

CONTROL/behaviour.json: TRIAL -> "crash" (a Python error), "die" (SIGKILL), "abort" (SIGABRT), "bad_alloc" (as C++ says it), "hang",
"orphan" (hangs, and does not end with its parent), "oom", or a number: rows above it are out of memory (where nothing is said, 5 fit).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

control, folder, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
rows = int(sys.argv[5]) if sys.argv[4] == "--rows" else None
with (control / "ran.txt").open("a") as log:
    log.write(f"{name}{'' if rows is None or '/prove' not in name else f'@{rows}'}\n")
what = json.loads((control / "behaviour.json").read_text()).get(name, 5 if "/prove" in name else None)
if what == "crash":
    raise RuntimeError("no luck today")
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "abort":
    os.abort()
if what == "bad_alloc":
    print("terminate called after throwing an instance of 'std::bad_alloc'", flush=True)
    os.abort()
if what in ("hang", "orphan"):
    if what == "hang":
        from moejax.study.characterize import trial  # slow to import: the others do without

        trial.end_with(int(sys.argv[-1]))
    (control / "hangs.txt").write_text(str(os.getpid()))
    time.sleep(600)
fits = not (what == "oom" or (isinstance(what, int) and rows is not None and rows > what))
facts = {"rows": 5, "peak_bytes": 1000, "argument_bytes": 10}
row = {
    "trial": name, "experiment": "throughput", "model": "mixtral-tiny", "method": "qlora", "routing": "sparse", "data": "problems",
    "batching": "fixed", "seq_len": 48, "batch": rows, "scope": "", "metric": "queries_per_second", "value": 0.1 + 0.2, "unit": "queries/s",
}  # fmt: skip
content = {
    "status": "done" if fits else "out_of_memory", "message": None if fits else "RESOURCE_EXHAUSTED", "seconds": 0.1,
    "rows": [row] if fits else [], "facts": facts if fits else {},
}  # fmt: skip
path = folder / "trials" / f"{name}{f'@{rows}' if '/prove' in name else ''}.json"
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps(content))
