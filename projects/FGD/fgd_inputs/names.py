"""Names of classes and files where they are written: messages, Markdown, HTML, figures. Stdlib.

Whoever wrote a dataset chose its names; they may hold HTML, Markdown, formulas, line breaks,
control characters, and bytes that are no text.
"""

import html
import re

# What a terminal or a page obeys instead of showing it: control characters, and marks that turn
# the direction of what follows. Surrogates stand for bytes that are not UTF-8.
_OBEYED = re.compile("[\0-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(
    r"""[\\`*\[\]|~$]          # code, emphasis, links, pictures, cells, formulas
    | (?<![^\W_])_ | _(?![^\W_])  # emphasis, but not the _ of model_final
    | ^\# | ^[-+=](?=[-=\s]|$)  # headings, lists, rules
    | ^\d+[.)](?=\s|$)
    | :(?=//) | (?<=www)\.     # addresses, which become links without any mark
    | ^:                       # definitions
    """,
    re.VERBOSE | re.IGNORECASE,
)


def one_line(text: str, longest: int = 0) -> str:
    r"""A name in a message or a picture: white space becomes one space, "\x1b" what is obeyed.

    Args:
        longest: characters; the end of a longer name becomes "...". 0 = as long as it is.
    """
    text = _OBEYED.sub(_shown, " ".join(text.split()))
    return text if not longest or len(text) <= longest else f"{text[: longest - 3]}..."


def html_text(text: str) -> str:
    """For HTML and SVG, in an element or a quoted attribute."""
    return html.escape(one_line(text))


def markdown_text(text: str) -> str:
    """For Markdown: a line, a cell or a part of them that is shown as it is, whatever it holds.

    What means something becomes a reference such as "&#124;", which every renderer shows as the
    character; a backslash would not do in all. Plain words, numbers and file names stay readable.
    """
    text = html.escape(one_line(text), quote=False)
    return _MARKDOWN.sub(lambda found: f"{found[0][:-1]}&#{ord(found[0][-1])};", text)


def figure_text(text: str) -> str:
    """For a text or a label of matplotlib, which reads $...$ as a formula.

    A label that begins with "_" would be left out of legends: a space stands before it.
    """
    text = one_line(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _shown(found: re.Match) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
