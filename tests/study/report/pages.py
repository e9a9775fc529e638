"""Reading a report as a browser would, without one."""

import csv
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "use", "path", "rect", "line"}


@dataclass
class Cell:
    """A number on the page, with everything that says what it is."""

    value: str
    source: str
    place: str
    text: str = ""
    section: str = ""
    group: str = ""
    line: str = ""
    head: str = ""
    beside: str = ""  # the study's model that the group's name says


@dataclass
class Seen:
    cells: list = field(default_factory=list)
    ids: list = field(default_factory=list)
    links: list = field(default_factory=list)
    fetched: list = field(default_factory=list)
    tags: list = field(default_factory=list)
    text: str = ""


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.seen, self.cell = Seen(), None
        self.section = self.group = self.line = ""
        self.heads, self.column, self.into = [], 0, None

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.seen.tags.append((tag, attributes))
        if "id" in attributes:
            self.seen.ids.append(attributes["id"])
        for name in ("href", "xlink:href", "src"):
            if name in attributes:
                (self.seen.links if tag == "a" else self.seen.fetched).append(attributes[name])
        if tag == "section":
            self.section = attributes["id"]
        elif tag == "table":
            self.heads, self.group = [], ""
        elif tag == "tbody":
            self.group = ""
        elif tag == "tr":
            self.line, self.column = "", -1
        elif tag in ("th", "td"):
            self.column += 1
            scope = attributes.get("scope")
            self.into = {"col": "head", "colgroup": "group", "row": "line"}.get(scope)
            if self.into == "head":
                self.heads.append("")
        elif tag == "data":
            head = self.heads[self.column] if 0 <= self.column < len(self.heads) else ""
            place = attributes.get("data-place", "")
            group, _, beside = self.group.removesuffix(")").partition(" (study: ")
            self.cell = Cell(attributes["value"], attributes["data-source"], place, "", self.section, group, self.line, head, beside)

    def handle_endtag(self, tag):
        if tag == "data":
            self.seen.cells.append(self.cell)
            self.cell = None
        elif tag in ("th", "td"):
            self.into = None
        elif tag == "section":
            self.section = ""
        elif tag == "table":
            self.heads, self.column = [], -1

    def handle_data(self, data):
        self.seen.text += data
        if self.cell:
            self.cell.text += data
        if self.into == "head":
            self.heads[-1] += data
        elif self.into:
            setattr(self, self.into, getattr(self, self.into) + data)


def read(path):
    """What is on a page."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    return reader.seen


def csv_lines(folder):
    """Line number -> the cells of results.csv as the strings that stand there."""
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return dict(enumerate(csv.DictReader(file), 2))
