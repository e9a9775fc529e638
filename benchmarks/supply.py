"""What moejax depends on here: each package with its version and licence, and what is known of its weaknesses (pip-audit, if installed).

    python benchmarks/supply.py [--out FILE]

Exit code 1 where a licence is not stated, or a weakness is known. pip-audit asks a database over the network; without it that is said.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement


def dependencies(name: str) -> dict[str, Distribution]:
    """The installed packages that `name` needs, its own extras left out, by their normal names; itself is not among them."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(name, "")]
    while waiting:
        package, extra = waiting.pop()
        for line in distribution(package).requires or []:
            needed = Requirement(line)
            key = re.sub(r"[-_.]+", "-", needed.name).lower()
            if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
                continue
            try:
                found[key] = distribution(key)
            except PackageNotFoundError:
                continue
            new = {(key, asked) for asked in ("", *needed.extras)} - seen
            seen |= new
            waiting += new
    return dict(sorted(found.items()))


def licence(package: Distribution) -> str | None:
    """As its metadata say it: an SPDX expression, a classifier, or the first line of a text."""
    said: Any = package.metadata
    if expression := said.get("License-Expression"):
        return str(expression)
    classified = [line.rpartition(" :: ")[2] for line in said.get_all("Classifier") or [] if line.startswith("License :: OSI Approved ::")]
    text = str(said.get("License") or "").strip()
    return ", ".join(classified) or text.splitlines()[0][:80] if classified or text else None


def weaknesses(packages: dict[str, Distribution]) -> tuple[list[str], str]:
    """(known ones, a line each; why nothing could be asked, "" where it could)."""
    tool = shutil.which("pip-audit", path=str(Path(sys.executable).parent)) or shutil.which("pip-audit")
    if tool is None:
        return [], "pip-audit is not installed (pip install pip-audit): known weaknesses were not looked up"
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("".join(f"{name}=={package.version}\n" for name, package in packages.items()))
            file.flush()
            command = [tool, "--format", "json", "--no-deps", "--disable-pip", "--progress-spinner", "off", "-r", file.name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        answer = json.loads(done.stdout)["dependencies"]
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        return [], f"pip-audit could not be asked ({type(error).__name__}; no network?): known weaknesses were not looked up"
    skipped = [each["name"] for each in answer if "skip_reason" in each]
    why = f"pip-audit could not look up {len(skipped)} of {len(answer)} packages: {', '.join(skipped[:5])} …" if skipped else ""
    return [f"{each['name']} {each['version']}: {known['id']}" for each in answer for known in each.get("vulns", [])], why


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file for the same")
    options = parser.parse_args()
    packages = dependencies("moejax")
    table = {name: {"version": package.version, "licence": licence(package)} for name, package in packages.items()}
    known, why = weaknesses(packages)
    for name, row in table.items():
        print(f"{name:28} {row['version']:16} {row['licence'] or 'NOT STATED'}")
    silent = [name for name, row in table.items() if row["licence"] is None]
    print(f"{len(table)} packages; licence not stated: {', '.join(silent) or 'none'}")
    print(f"known weaknesses: {'; '.join(known) or why or 'none'}")
    if options.out:
        options.out.write_text(json.dumps({"packages": table, "weaknesses": known, "not_asked": why}, indent=1) + "\n")
    return 1 if silent or known else 0


if __name__ == "__main__":
    sys.exit(main())
