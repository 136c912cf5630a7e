"""The web page for every reader: light and dark, a phone's width, screen readers."""

from __future__ import annotations

import itertools
import re

import pytest
from playwright.async_api import expect

from tests.browser import DESKTOP, PHONE, open_page

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

QUESTION = "Tell me a story."
LONG_MARKDOWN = "\n".join(
    [
        "```python",
        "value = 'a line of code that no phone is wide enough for, whatever the size of its letters' * 2",
        "```",
        "",
        "| " + " | ".join(f"column {n}" for n in range(12)) + " |",
        "|" + "---|" * 12,
        "| " + " | ".join(f"value {n}" for n in range(12)) + " |",
        "",
        "a" * 300,
    ]
)


async def brightness(chat) -> float:
    """Of the page's ground, 0 to 1."""
    (colour,) = await chat.style(chat.page.locator("html"), "backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return (red + green + blue) / (3 * 255)


async def test_it_is_dark_where_the_system_is(browser, url):
    async with open_page(browser, url, color_scheme="dark") as chat:
        assert await brightness(chat) < 0.2


async def test_the_theme_can_be_chosen_and_is_remembered(chat):
    assert await brightness(chat) > 0.9
    button = chat.page.get_by_role("button", name="Theme")
    await button.click()
    assert await brightness(chat) > 0.9
    await button.click()
    await expect(button).to_have_accessible_name("Theme: dark")
    await chat.page.reload()
    await expect(button).to_have_accessible_name("Theme: dark")
    assert await brightness(chat) < 0.2


async def test_a_phone_never_scrolls_sideways(browser, url):
    async with open_page(browser, url, viewport=PHONE) as chat:
        await chat.choose("Speculate")
        await chat.ask(QUESTION)
        await chat.answer.get_by_role("button", name="Details").click()
        await expect(chat.details.get_by_role("img", name="Drafts accepted")).to_be_visible()
        await expect((await chat.render(LONG_MARKDOWN)).get_by_role("table")).to_be_visible()
        assert await chat.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


@pytest.mark.parametrize("width", [320, 375, 500])
async def test_on_a_narrow_screen_no_control_lies_over_another(browser, url, width):
    async with open_page(browser, url, viewport={"width": width, "height": 700}) as chat:
        await chat.choose("Speculate")
        controls = await chat.page.locator("#modes label, #send").all()
        boxes = [await control.bounding_box() for control in controls]
        for one, other in itertools.combinations(boxes, 2):
            beside = (
                one["x"] + one["width"] <= other["x"] + 0.5 or other["x"] + other["width"] <= one["x"] + 0.5
            )
            assert (
                beside or one["y"] + one["height"] <= other["y"] or other["y"] + other["height"] <= one["y"]
            )
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)


@pytest.mark.parametrize(
    ("scheme", "viewport"),
    [
        pytest.param("light", DESKTOP, id="light"),
        pytest.param("dark", DESKTOP, id="dark"),
        pytest.param("light", PHONE, id="phone"),
    ],
)
async def test_axe_finds_nothing_wrong(browser, url, scheme, viewport):
    async with open_page(browser, url, color_scheme=scheme, viewport=viewport) as chat:
        assert await chat.accessibility_problems() == []
        await chat.choose("Speculate")
        await chat.ask(QUESTION)
        await chat.choose("Auto")
        await chat.ask(QUESTION)
        if viewport is PHONE:
            await chat.answer.get_by_role("button", name="Details").click()
        await chat.details.get_by_text("What the small model said of the question").click()
        assert await chat.accessibility_problems() == []
        await chat.setting("System prompt")
        assert await chat.accessibility_problems() == []


async def test_axe_finds_nothing_wrong_while_drafts_are_dim(chat, slow_cloud):
    await chat.choose("Speculate")
    await chat.begin(QUESTION)
    await expect(chat.body.locator(".provisional").first).to_be_visible()
    assert await chat.accessibility_problems() == []


async def test_screen_readers_hear_confirmed_sentences_and_no_tokens(chat):
    await chat.page.evaluate(
        """() => {
          window.heard = [];
          const ear = new MutationObserver((changes) => {
            for (const { addedNodes } of changes)
              for (const node of addedNodes) heard.push(node.textContent);
          });
          for (const region of document.querySelectorAll("[aria-live], [role='status'], [role='log']"))
            ear.observe(region, { childList: true, subtree: true });
        }"""
    )
    await chat.choose("Speculate")
    answer = (await chat.ask(QUESTION))[-1]
    await expect(chat.page.get_by_role("status")).to_have_text("The answer is complete")
    heard = await chat.page.evaluate("heard")
    assert heard[0] == "Answering"
    words = "".join(heard[1:-1])
    assert re.sub(r"[\W_]", "", words) == re.sub(r"[\W_]", "", answer["answer"])
    assert len(heard) < len(answer["tokens"]) / 2


async def test_everything_can_be_reached_with_the_keyboard_and_shows_its_focus(chat):
    await chat.choose("Local")
    await chat.ask(QUESTION)
    await chat.page.get_by_role("link", name="Skip to the question").focus()
    reached = []
    for _ in range(20):
        await chat.page.keyboard.press("Tab")
        focused = chat.page.locator(":focus")
        name, outline = await focused.evaluate(
            """(node) => [
              node.getAttribute("aria-label") || node.labels?.[0]?.textContent || node.textContent,
              getComputedStyle(node.type === "radio" ? node.nextElementSibling : node).outlineStyle,
            ]"""
        )
        reached.append(name.strip())
        assert outline == "solid", name
        if name.strip() == "Send":
            break
    for name in ("New chat", "Settings", "Copy", "Try again", "Details", "Local", "Send"):
        assert any(name in one for one in reached), (name, reached)
