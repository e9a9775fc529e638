"""A page as one HTML file: no script, nothing from elsewhere; for a wide screen, a phone, paper, light and dark."""

from __future__ import annotations

from html import escape

from moejax.study.report.page import (
    Block,
    Code,
    Commands,
    Figure,
    Fold,
    Fragment,
    Items,
    Link,
    Number,
    Page,
    Paragraph,
    Section,
    Table,
    Text,
)

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2129; --soft: #59636e; --faint: #b9c0c8; --line: #dfe3e8; --wash: #f5f7f9;
  --link: #0a58a8; --warn: #fff4e0; --warnline: #d98c00; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181d; --ink: #e4e7eb; --soft: #a0a8b2; --faint: #6b737d; --line: #343a42;
  --wash: #1e2228; --link: #7ab8ff; --warn: #33290f; --warnline: #d98c00; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 50rem; padding: 1.5rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
a { color: var(--link); }
nav ol { margin: .3rem 0; padding-left: 0; list-style: none; columns: 2; column-gap: 2rem; }
nav li { break-inside: avoid; padding: .12rem 0; }
.warning { background: var(--warn); border-left: 4px solid var(--warnline); padding: .6rem .9rem; }
figure { margin: 1.2rem 0; }
figure svg { display: block; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem; }
.scroll { overflow-x: auto; margin: .8rem 0; background: linear-gradient(to right, var(--paper) 40%, transparent) left,
  linear-gradient(to left, var(--paper) 40%, transparent) right, linear-gradient(to right, var(--faint), transparent) left,
  linear-gradient(to left, var(--faint), transparent) right; background-repeat: no-repeat;
  background-attachment: local, local, scroll, scroll; background-size: 2rem 100%, 2rem 100%, .6rem 100%, .6rem 100%; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
caption span { display: block; max-width: calc(100vw - 3.4rem); }
th, td { padding: .28rem .7rem .28rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.words td { text-align: left; overflow-wrap: anywhere; }
.words th { text-align: left; }
.wide .words td { overflow-wrap: break-word; } .wide .words td:last-child { min-width: 16rem; }
tbody th { font-weight: 400; }
tr.group th { font-weight: 600; padding-top: .8rem; text-align: left; }
thead th { font-weight: 600; border-bottom: 1.5px solid var(--soft); vertical-align: bottom; }
data { white-space: nowrap; }
.study { color: var(--soft); }
details { margin: .6rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .45rem .8rem; }
summary { cursor: pointer; color: var(--link); }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; overflow-x: auto; font-size: .8rem;
  line-height: 1.5; white-space: pre-wrap; }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace; font-size: .92em; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 34rem) { body { padding: 1rem .9rem 3rem; } nav ol { columns: 1; } h1 { font-size: 1.4rem; }
  th, td { padding-right: .5rem; } table { font-size: .82rem; }
  .wide caption span::after { content: " Scroll sideways for more columns →"; }
  .wide tr:not(.group) > :first-child { position: sticky; left: 0; background: var(--paper); max-width: 9rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } :root { color-scheme: light; --paper: #fff; --ink: #000;
  --soft: #444; --line: #ccc; --wash: #fff; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } details:not([open]) { display: none; } }
"""


def render(page: Page) -> str:
    """The whole file. Numbers are <data>: `value` what is exact, `data-source` whose, `data-place` the folder and the line of its CSV."""
    contents = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in page.sections)
    body = "\n".join(_section(s) for s in page.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(page.title)}</h1>
{_blocks(page.lead)}
</header>
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main>
{body}
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    heading = f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-heading">\n<h2 id="{section.anchor}-heading">'
    return f"{heading}{escape(section.title)}</h2>\n{_blocks(section.blocks)}\n</section>"


def _blocks(blocks: tuple[Block, ...]) -> str:
    return "\n".join(_block(b) for b in blocks)


def _block(block: Block) -> str:
    match block:
        case Paragraph(content, kind):
            return f'<p class="warning" role="note">{_text(content)}</p>' if kind == "warning" else f"<p>{_text(content)}</p>"
        case Items(items, ordered):
            tag = "ol" if ordered else "ul"
            return f"<{tag}>" + "".join(f"<li>{_text(i)}</li>" for i in items) + f"</{tag}>"
        case Table():
            return _table(block)
        case Figure(_, title, svg):
            return f"<figure>{svg}<figcaption>{escape(title)}</figcaption></figure>"
        case Commands(lines):
            return "<pre><code>" + "\n".join(escape(line) for line in lines) + "</code></pre>"
        case Fold(summary, blocks, is_open):
            return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>\n{_blocks(blocks)}\n</details>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in table.head)
    bodies = []
    for group in table.groups:
        title = ""
        if any(group.title):
            title = f'<tr class="group"><th colspan="{len(table.head)}" scope="colgroup">{_text(group.title)}</th></tr>'
        rows = "".join(
            f'<tr><th scope="row">{_text(row[0])}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:]) + "</tr>"
            for row in group.rows
        )
        bodies.append(f"<tbody>{title}{rows}</tbody>")
    words = "" if any(isinstance(f, Number) for g in table.groups for r in g.rows for c in r for f in c) else ' class="words"'
    # A region that scrolls sideways must be within the keyboard's reach, and have a name.
    wide = " wide" if len(table.head) > 3 else ""
    region = f'<div class="scroll{wide}" tabindex="0" role="region" aria-label="{escape(_plain(table.caption))}">'
    caption = f"<caption><span>{_text(table.caption)}</span></caption>"
    return f"{region}<table{words}>{caption}<thead><tr>{head}</tr></thead>{''.join(bodies)}</table></div>"


def _plain(content: Text) -> str:
    return "".join(f if isinstance(f, str) else f.text for f in content)


def _text(content: Text) -> str:
    return "".join(_fragment(f) for f in content)


def _fragment(fragment: Fragment) -> str:
    match fragment:
        case Number(text, exact, source, place):
            where = f' data-place="{place}"' if place else ""
            kind = ' class="study"' if source == "study" else ""
            return f'<data{kind} value="{escape(exact)}" data-source="{source}"{where}>{escape(text)}</data>'
        case Code(text):
            return f"<code>{escape(text)}</code>"
        case Link(text, anchor):
            return f'<a href="#{escape(anchor)}">{escape(text)}</a>'
        case str():
            return escape(fragment)
