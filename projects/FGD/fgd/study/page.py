"""A report as Markdown, and as one HTML file that refers to nothing outside itself."""

import base64
from typing import Callable, Sequence

from tabulate import tabulate

from fgd_inputs.names import html_text as escape
from fgd_inputs.names import markdown_text

from .report import Section

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
p { max-width: 50em }
h1 + p { font-size: 1.3em }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .2em .6em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
div { overflow-x: auto }
summary { font-weight: bold; margin: .5em 0; cursor: pointer }
img { max-width: 100% }
"""


def markdown(sections: Sequence[Section], shown: Callable[[str], str] = markdown_text) -> str:
    """Pictures are linked: they lie beside the file.

    Args:
        shown: how texts are written; `one_line` for a terminal.
    """
    parts = []
    for level, section in enumerate(sections):
        title = shown(section.title)
        parts += [f"{'##' if level else '#'} {title}", *map(shown, section.text)]
        if section.picture:
            parts.append(f"![{title}]({section.picture.name})")
        if section.table:
            headers, *rows = [[*map(shown, line)] for line in section.table]
            parts.append(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def html_page(sections: Sequence[Section]) -> str:
    """Pictures are inside."""
    body = "".join(_html(section, "h2" if i else "h1") for i, section in enumerate(sections))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(sections[0].title)}</title><style>{_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _html(section: Section, heading: str) -> str:
    parts = [f"<p>{escape(line)}</p>" for line in section.text]
    if section.picture:
        data = base64.b64encode(section.picture.read_bytes()).decode()
        parts.append(f'<img alt="{escape(section.title)}" src="data:image/png;base64,{data}">')
    if section.table:
        head, *rows = (
            "<tr>" + "".join(f"<{cell}>{escape(c)}</{cell}>" for c in line) + "</tr>"
            for cell, line in zip(["th"] + ["td"] * len(section.table), section.table)
        )
        table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
        parts.append(f"<div>{table}</div>")  # what is too wide is scrolled, not broken
    title, body = escape(section.title), "".join(parts)
    if section.folded:
        return f"<details><summary>{title}</summary>{body}</details>"
    return f"<{heading}>{title}</{heading}>{body}"
