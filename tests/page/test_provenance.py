"""What the web page shows of an answer: drafts, corrections, who wrote what, the router, the chart."""

from __future__ import annotations

import re

import pytest
from playwright.async_api import expect

from tests.browser import open_page

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

QUESTION = "Tell me a story."
ORIGINS = ("accepted", "correction", "bonus", "cloud", "local")


async def test_drafts_are_dim_until_they_are_confirmed(chat, slow_cloud):
    await chat.choose("Speculate")
    await chat.begin(QUESTION)
    draft = chat.body.locator(".provisional").first
    (solid,) = await chat.style(chat.page.locator("body"), "color")
    await expect(draft).to_be_visible()
    await expect(draft).not_to_have_css("color", solid)
    await expect(chat.body.locator(".piece").first).to_have_css("color", solid)
    await expect(chat.answer.locator(".summary")).to_be_visible()
    await expect(draft).to_have_count(0)


async def test_corrections_flash_as_they_come(chat, slow_cloud):
    await chat.choose("Speculate")
    await chat.begin(QUESTION)
    await expect(chat.body.locator(".piece.correction").first).to_have_css("animation-name", "flash")


async def test_nothing_moves_for_readers_who_want_less_motion(browser, url, slow_cloud):
    async with open_page(browser, url, reduced_motion="reduce") as chat:
        await chat.choose("Speculate")
        await chat.begin(QUESTION)
        correction = chat.body.locator(".piece.correction.flash").first
        await expect(correction).to_have_css("outline-style", "solid")
        await expect(correction).to_have_css("animation-name", "none")


async def test_the_legend_counts_who_wrote_the_tokens(chat):
    await chat.choose("Speculate")
    answer = (await chat.ask(QUESTION))[-1]
    origins = [token["origin"] for token in answer["tokens"]]
    legend = chat.answer.get_by_role("group", name="Who wrote what")
    for origin, name in (
        ("accepted", "edge, accepted"),
        ("correction", "cloud, correction"),
        ("bonus", "cloud, bonus"),
    ):
        button = legend.get_by_role("button", name=f"{name} {origins.count(origin)} ")
        await expect(button).to_have_count(1 if origin in origins else 0)


async def test_writers_differ_by_colour_and_by_underline(chat):
    looks = await chat.page.evaluate(
        """(origins) => {
          const turn = document.querySelector("#transcript").appendChild(document.createElement("p"));
          return origins.map((origin) => {
            const piece = turn.appendChild(document.createElement("span"));
            piece.className = `piece ${origin}`;
            const style = getComputedStyle(piece);
            return [style.backgroundColor, `${style.textDecorationLine} ${style.textDecorationStyle}`];
          });
        }""",
        list(ORIGINS),
    )
    colours, underlines = zip(*looks, strict=True)
    assert len(set(colours)) == len(ORIGINS)
    assert len(set(underlines)) == len(ORIGINS)


async def test_the_legend_picks_out_one_writer(chat):
    await chat.choose("Speculate")
    await chat.ask(QUESTION)
    button = chat.answer.get_by_role("button", name="edge, accepted")
    await button.click()
    await expect(button).to_have_attribute("aria-pressed", "true")
    other = chat.body.locator(".piece.bonus").first
    assert await chat.style(other, "backgroundColor") == ("rgba(0, 0, 0, 0)",)
    await button.click()
    assert await chat.style(other, "backgroundColor") != ("rgba(0, 0, 0, 0)",)


async def test_a_piece_says_who_wrote_it_and_what_the_draft_was(chat):
    await chat.choose("Speculate")
    await chat.ask(QUESTION)
    await chat.body.locator(".piece.correction").first.hover()
    tooltip = chat.page.get_by_role("tooltip")
    await expect(tooltip).to_contain_text("cloud, correction")
    await expect(tooltip).to_contain_text("The draft said")


async def test_the_arrow_keys_walk_through_the_pieces_and_they_are_spoken(chat):
    await chat.choose("Speculate")
    await chat.ask(QUESTION)
    await chat.body.focus()
    status = chat.page.get_by_role("status")
    for index in range(2):
        await chat.page.keyboard.press("ArrowRight")
        await expect(chat.body.locator(".piece").nth(index)).to_have_class(re.compile(r"\bcurrent\b"))
        await expect(status).to_contain_text(re.compile("edge, accepted|cloud, (bonus|correction)"))


async def test_the_colours_can_be_turned_off(chat):
    await chat.choose("Local")
    await chat.ask(QUESTION)
    await (await chat.setting("Show who wrote what")).uncheck()
    await chat.save_settings()
    piece = chat.body.locator(".piece").first
    assert await chat.style(piece, "backgroundColor", "textDecorationLine") == ("rgba(0, 0, 0, 0)", "none")


async def test_the_routers_view_is_shown(chat):
    await chat.choose("Auto")
    events = await chat.ask(QUESTION)
    route = next(event for event in events if event["type"] == "route")
    router = chat.details.get_by_label("The router")
    await expect(router).to_contain_text(f"{round(100 * route['p_cloud'])}%")
    await expect(router).to_contain_text(f"Expected length {route['predicted_tokens']} tokens")
    for reason in route["reasons"]:
        await expect(router).to_contain_text(reason)
    await router.get_by_text("What the small model said of the question").click()
    for probe in route["probes"]:
        await expect(router.get_by_role("heading", name=probe)).to_be_visible()


async def test_the_chart_shows_acceptance_and_speed_while_the_answer_is_made(chat, slow_cloud):
    await chat.choose("Speculate")
    await chat.begin(QUESTION)
    chart = chat.details.get_by_role("img", name="Drafts accepted")
    await expect(chart).to_be_visible()
    await expect(chat.stop).to_be_visible()
    await expect(chat.details.get_by_role("img", name="Speed")).to_be_visible()
    await expect(chat.answer.locator(".summary")).to_be_visible()
    await expect(chart).to_have_accessible_name(re.compile(r"\d+%; \d+ of \d+ draft tokens in \d+ rounds"))


async def test_the_chart_counts_every_draft_token(chat):
    await chat.choose("Speculate")
    answer = (await chat.ask(QUESTION))[-1]
    chart = chat.details.get_by_role("img", name="Drafts accepted")
    counted = f"{answer['accepted_tokens']} of {answer['drafted_tokens']} draft tokens"
    await expect(chart).to_have_accessible_name(re.compile(counted))
