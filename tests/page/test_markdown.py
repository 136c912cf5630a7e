"""The page's Markdown: what it makes of text, and that every leaf knows where in the text it stands."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.browser import ChatPage, open_page

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

OUTLINE = """
async ([source, isOpen]) => {
  const { parse } = await import("/page/markdown.js");
  const outline = (node) => {
    if (node.type === "text") {
      const there = source.substr(node.start, node.text.length);
      return there === node.text ? node.text.replaceAll("\\n", "⏎") : `${node.text} is not ${there}`;
    }
    const parts = node.items ?? (node.rows ? [node.header, ...node.rows].map((row) => row.flat()) : [node.children ?? []]);
    return `${node.type}(${parts.map((nodes) => nodes.map(outline).join("|")).join(" / ")})`;
  };
  return parse(source, isOpen).map(outline).join(" ");
}
"""  # noqa: E501


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def script(browser, url) -> AsyncIterator[ChatPage]:
    """Nothing here changes the page, so one serves all."""
    async with open_page(browser, url) as chat:
        yield chat


async def outline(script: ChatPage, source: str, *, is_open: bool = False) -> str:
    """Blocks as `type(leaf|leaf)`, list items and table rows apart by a slash.

    A leaf that does not stand in the source where it says shows both texts.
    """
    return str(await script.page.evaluate(OUTLINE, [source, is_open]))


@pytest.mark.parametrize(
    ("source", "blocks"),
    [
        pytest.param("one\ntwo", "paragraph(one⏎|two)", id="a line break stays in its paragraph"),
        pytest.param("# A #\nb", "heading(A) paragraph(b)", id="a heading ends with its line"),
        pytest.param("```py\na\n\nb\n```\nc", "code(a⏎|⏎|b) paragraph(c)", id="a fence keeps blank lines"),
        pytest.param("```\na", "code(a)", id="a fence that is not closed reaches to the end"),
        pytest.param(
            "- a\n- b\n  - c", "list(paragraph(a) / paragraph(b)|list(paragraph(c)))", id="lists nest"
        ),
        pytest.param(
            "1. a\n\n2. b", "list(paragraph(a) / paragraph(b))", id="blank lines do not break a list"
        ),
        pytest.param("- a\nb", "list(paragraph(a⏎|b))", id="a line that just runs on belongs to its item"),
        pytest.param("> a\n> b", "quote(paragraph(a⏎|b))", id="quotes hold blocks"),
        pytest.param("a | b\n--|:-:\n1 | 2", "table(a|b / 1|2)", id="a table"),
        pytest.param("---", "rule()", id="a rule"),
        pytest.param(
            "a **b** _c_ ~~d~~ `e`",
            "paragraph(a |strong(b)| |emphasis(c)| |strike(d)| |inline-code(e))",
            id="marks in a line",
        ),
        pytest.param("***a***", "paragraph(strong(emphasis(a)))", id="bold and slanted"),
        pytest.param("2 * 3 * 4 a_b_c", "paragraph(2 * 3 * 4 a_b_c)", id="signs that mark nothing"),
        pytest.param(r"\*a\*", "paragraph(*|a|*)", id="escapes"),
        pytest.param(
            "at https://a.example/b.",
            "paragraph(at |link(https://a.example/b)|.)",
            id="an address is a link without the full stop",
        ),
        pytest.param("**a", "paragraph(**a)", id="a mark without its partner is text"),
        pytest.param("", "", id="nothing"),
    ],
)
async def test_markdown(script, source, blocks):
    assert await outline(script, source) == blocks


async def test_marks_of_a_text_that_goes_on_count_as_closed_at_its_end(script):
    assert await outline(script, "a\n\n- **b", is_open=True) == "paragraph(a) list(paragraph(strong(b)))"


async def test_every_beginning_of_a_text_can_be_shown(script):
    """As they come while an answer is streamed."""
    source = (
        "# T\n\n1. **a** `b`\n   - c\n\n```js\nd\n```\n> e\n\n| f | g |\n|---|---|\n| h | i |\n\n***\n"
        "[j](https://k.example) *l"
    )
    for length in range(len(source) + 1):
        assert "is not" not in await outline(script, source[:length], is_open=True)
