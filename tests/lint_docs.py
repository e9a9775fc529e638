"""What `make lint` finds in Markdown files: words that are bold in docs/style.md, links that do not arrive at a file and heading, and
commands that name what does not exist: a command or option, a script, a config, a target of make, a key of the config. Exit code 1, with
file and line of each."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from moejax import cli, config_file  # noqa: E402
from moejax.config import Experiment  # noqa: E402

WORDS = re.findall(r"\*\*(.+?)\*\*", (ROOT / "docs/style.md").read_text(encoding="utf-8"))
PATTERN = re.compile(rf"\b({'|'.join(WORDS)})\b")
CODE = re.compile(r"`([^`]+)`")
OURS = re.compile(r"(?:^|[;&|(=] ?)((?:(?:moejax|make) |\S*python3? (?:-m moejax|\S+\.py)\b)[^;&|]*)")
FILE = re.compile(r"(?:configs|tests|docs|assets|benchmarks)/[\w./*{},-]*")


def lines(text):
    """(line number, line, whether it is code) of a page, lines that end with a backslash joined to the next."""
    fenced, begun, joined = False, 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        code = fenced or line.startswith("    ")
        begun, joined = (begun, joined + line.lstrip()) if joined else (number, line)
        if code and joined.endswith("\\"):
            joined = joined[:-1]
            continue
        yield begun, joined, code
        joined = ""


def words(text):
    for number, line, code in lines(text):
        if not code:
            for match in PATTERN.finditer(CODE.sub("", line)):
                yield number, f"{match[0]!r}: docs/style.md has another word"


@cache
def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text, page):
    for number, line, code in lines(text):
        for target in [] if code else re.findall(r"\]\(([^)\s]+)\)", line):
            if target.startswith(("http:", "https:")):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists():
                yield number, f"{target}: no such file"
            elif anchor and anchor not in anchors(file):
                yield number, f"{target}: no such heading"


def commands(text):
    """(line number, command) in code blocks, and between backticks also where the command goes on in the next line."""
    prose, starts = [], []
    for number, line, code in lines(text):
        if code:
            for match in OURS.finditer(re.split(r"(?:^| )#", line.strip().removeprefix("$ "))[0]):
                yield number, match[1]
        else:
            starts.append((sum(map(len, prose)), number))
            prose.append(line + "\n" if line.strip() else "`\n" * ("".join(prose).count("`") % 2) + "\n")
    whole = "".join(prose)
    for match in re.finditer(r"`((?:moejax|make|python3?) [^`]+)`", whole):
        yield [number for start, number in starts if start <= match.start()][-1], " ".join(match[1].split())


@cache
def options(module):
    parser = argparse.ArgumentParser()
    importlib.import_module(module).add_arguments(parser)
    more = {"--study"} if module == "moejax.commands.estimate_memory" else set()
    return {option for action in parser._actions for option in action.option_strings} | more


@cache
def targets():
    return set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


@cache
def scripts():
    """What the programs of a folder say, for their options: those of a helper are another's too."""
    folders = ("benchmarks", "tests", "docs")
    return {folder: "".join(path.read_text(encoding="utf-8") for path in (ROOT / folder).glob("*.py")) for folder in folders}


def mistakes(command):
    """What a command names that does not exist. Words in capitals, `…` and what has brackets around it stand for something else."""
    command = command.replace("[", " [ ").replace("]", " ] ") if re.search(r"\[(--|\w+\.\w+=|[A-Z])", command) else command
    try:
        first, *rest = shlex.split(command)
    except ValueError:
        first, *rest = command.split()
    if first == "make":
        yield from (f"make {t}: no such target" for t in rest if re.fullmatch(r"[a-z][\w-]*", t) and t not in targets())
        return
    if first.split("/")[-1].startswith("python"):
        if rest[0] == "-m" and rest[1] != "moejax":
            return
        script, *rest = rest[1:] if rest[0] == "-m" else rest
        named = {"train.py": ["train"], "estimate.py": ["estimate"], "moejax": []}
        if script not in named:
            if not (ROOT / script).is_file():
                yield f"{script}: no such file"
            text = scripts().get(script.split("/")[0], "")
            yield from (f"{script} {w}: no such option" for w in rest if re.fullmatch(r"--[\w-]+", w) and f'"{w}"' not in text)
            rest, module = [w for w in rest if not w.startswith("--")], None
        else:
            rest, module = [*named[script], *rest], ""
    else:
        module = ""
    if module == "":
        found = cli.Command("", commands=cli.COMMANDS)
        while found.commands and rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]):
            if rest[0] not in found.commands:
                yield f"{rest[0]}: no such command"
                return
            found, rest = found.commands[rest[0]], rest[1:]
        if found.module:
            known = options(found.module)
            flags = [w.split("=")[0] for w in rest if re.match(r"--[a-z]", w)]
            yield from (f"{flag}: no such option" for flag in flags if flag not in known)
    for word in rest:
        key, equals, _ = word.partition("=")
        ours = equals and key.partition(".")[0] in Experiment.model_fields and not key.startswith("model.overrides.")
        if ours and "…" not in key and not config_file.is_key(key, Experiment):
            yield f"{key}: no such key of the config"


def named_files(command):
    for name in FILE.findall(command):
        shown = re.sub(r"\{[^}]*\}", "*", name).rstrip(".,")
        if not re.search(r"[A-Z]{3}|…|generated|DATE", shown) and not any(ROOT.glob(shown)):
            yield f"{shown}: no such file"


def found(page):
    text = page.read_text(encoding="utf-8")
    if page != ROOT / "docs/style.md":
        yield from words(text)
    yield from links(text, page)
    for number, command in commands(text):
        yield from ((number, f"`{command}`: {mistake}") for mistake in [*mistakes(command), *named_files(command)])


def main():
    files = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wrong = [f"{name}:{number}: {what}" for name in files for number, what in found(ROOT / name)]
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
