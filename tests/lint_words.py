"""Words that are bold in docs/style.md, found in Markdown by `make lint`. Exit code 1, with file and line of each."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORDS = re.findall(r"\*\*(.+?)\*\*", (ROOT / "docs/style.md").read_text(encoding="utf-8"))
PATTERN = re.compile(rf"\b({'|'.join(WORDS)})\b")


def found(text):
    """(line number, word) outside of code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= line.startswith("```")
        if not fenced:
            for match in PATTERN.finditer(re.sub(r"`[^`]*`", "", line)):
                yield number, match[0]


def main():
    files = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wrong = [
        f"{name}:{number}: {word!r}: docs/style.md has another word"
        for name in files if name != "docs/style.md"
        for number, word in found((ROOT / name).read_text(encoding="utf-8"))
    ]  # fmt: skip
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
