"""Names reach messages, Markdown, HTML and figures as they are, and nothing obeys them."""

import html
import re

import markdown
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import cbook

from fgd_inputs.names import figure_text, html_text, markdown_text, one_line

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "$\\frac{$ a|b `c` [x](javascript:alert(1)) ![y](http://127.0.0.1:9/y.png)",
    'O\'Neil "q" </td></table>\n## Injected heading\n\n<b>&amp;',
    "# heading",
    "#<no space",
    "---",
    "- list",
    "12345. list",
    "*a* _b_ __c__ ~~d~~ ***",
    "http://127.0.0.1:9/ www.example.org",
    "&#124; &lt;b&gt;",
    "[a]: http://x",
)
PIECES = st.sampled_from(
    [*"<>&|`*_[]()!$\\#~-+=.:1a \n\t\"'", "http://x", "www.", "\x1b", "\udcff"]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=12)


def rendered(source):
    """What a reader of the Markdown sees, and the tags that made it."""
    page = markdown.markdown(source, extensions=["tables", "fenced_code"])
    tags = re.findall(r"</?(\w+)", page)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", page)).split()), sorted(set(tags))


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_shows_the_name_and_nothing_else(name):
    shown = one_line(name)
    assert rendered(markdown_text(name)) == (shown, ["p"])
    table = f"| class | AP |\n| --- | --- |\n| {markdown_text(name)} | 1 |\n"
    text, tags = rendered(table)
    assert text == f"class AP {shown} 1"
    assert tags == ["table", "tbody", "td", "th", "thead", "tr"]


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_any_text_is_one_paragraph_of_itself(name):
    source = markdown_text(name)
    assert "\n" not in source and source.encode("utf-8").decode("utf-8") == source
    # "x" before it: an empty name is no paragraph
    assert rendered(f"x {source}") == (one_line(f"x {name}"), ["p"])
    if one_line(name):
        assert rendered(source) == (one_line(name), ["p"])
    assert html.unescape(html_text(name)) == one_line(name)
    assert not set(html_text(name)) & set("<>\"'\n")


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_no_text_is_a_formula(name):
    shown, is_math = cbook_text(figure_text(name))
    assert not is_math and shown.strip() == one_line(name).strip()
    assert not figure_text(name).startswith("_")


def cbook_text(text):
    """As matplotlib's Text._preprocess_math reads it."""
    if cbook.is_math_text(text):
        return text, True
    return text.replace(r"\$", "$"), False


@pytest.mark.parametrize(
    "name, shown",
    [
        ("a  b\r\n c", "a b c"),
        ("\x1b[31mred\x00", r"\x1b[31mred\x00"),
        ("caf\udce9.png", r"caf\xe9.png"),
        ("\ud800", r"\ud800"),
        ("evil\u202egnp.exe", r"evil\u202egnp.exe"),
        ("größe 圆 👩‍🚀", "größe 圆 👩‍🚀"),
    ],
)
def test_one_line_shows_what_would_be_obeyed(name, shown):
    assert one_line(name) == shown


def test_plain_words_numbers_and_file_names_stay_readable():
    for text in ("model_final.onnx, batch 8", "-0.25", "12.5", "a-b (c)!", "C:/x", "3.", "–"):
        assert markdown_text(text).replace("&#46;", ".") == text
    assert markdown_text("model_final_onnx/model.onnx") == "model_final_onnx/model.onnx"


def test_long_names_are_cut():
    assert one_line("a" * 100, 10) == "aaaaaaa..." and one_line("a" * 10, 10) == "a" * 10
