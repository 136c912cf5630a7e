"""The web page when something is wrong: no cloud, no key, no server, and text that wants to be markup."""

from __future__ import annotations

import pytest
from playwright.async_api import expect

from tests.browser import open_page
from tests.page.conftest import MAX_TOKENS
from tests.service import running_serve

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

QUESTION = "Tell me a story."
NOBODY = "127.0.0.1:9"
API_KEY = "open-sesame-open-sesame"


async def test_without_a_cloud_the_edge_answers_and_the_page_says_so(browser, tiny_pair):
    with running_serve(tiny_pair.draft_gguf, cloud=NOBODY, max_tokens=MAX_TOKENS) as served:
        async with open_page(browser, served.address) as chat:
            await chat.choose("Auto")
            await chat.ask(QUESTION)
            await expect(chat.answer.locator(".notice")).to_contain_text("Answered by the edge model alone")
            await expect(chat.body.locator(".piece.local").first).to_be_visible()
            await chat.choose("Cloud")
            await chat.begin("What then?")
            await expect(chat.page.get_by_role("alert")).to_contain_text(NOBODY)
            await chat.choose("Local")
            async with chat.page.expect_request("**/api/chat") as asked:
                await chat.begin("And now?")
            sent = (await asked.value).post_data_json["messages"]
            assert [message["content"] for message in sent[::2]] == [QUESTION, "And now?"]
            await expect(chat.answer.locator(".summary")).to_be_visible()
            chat.complaints.clear()


async def test_a_server_with_a_key_asks_for_it(browser, tiny_pair):
    with running_serve(
        tiny_pair.draft_gguf, cloud=NOBODY, max_tokens=MAX_TOKENS, env={"DUET_API_KEY": API_KEY}
    ) as served:
        async with open_page(browser, served.address) as chat:
            dialog = chat.page.get_by_role("dialog", name="Settings")
            await expect(dialog.get_by_label("API key")).to_be_focused()
            await dialog.get_by_label("API key").fill(API_KEY)
            await chat.save_settings()
            await chat.choose("Local")
            await chat.ask(QUESTION)
            await expect(chat.body.locator(".piece").first).to_be_visible()
            chat.complaints.clear()  # the browser itself reports the first refusal


async def test_a_server_that_dies_in_the_middle_leaves_what_was_confirmed(browser, tiny_pair, slow_cloud):
    with running_serve(tiny_pair.draft_gguf, cloud=slow_cloud.address, max_tokens=MAX_TOKENS) as served:
        async with open_page(browser, served.address) as chat:
            await chat.choose("Speculate")
            await chat.begin(QUESTION)
            await expect(chat.body.locator(".piece").first).to_be_visible()
            served.process.kill()
            await expect(chat.page.get_by_role("alert")).to_contain_text("Is `duet serve` still running?")
            await expect(chat.body.locator(".piece").first).to_be_visible()
            await expect(chat.body.locator(".provisional")).to_have_count(0)
            chat.complaints.clear()


async def test_the_page_asks_no_other_host_and_runs_no_inline_script(chat, url):
    await chat.choose("Local")
    await chat.ask(QUESTION)
    assert {request.url.startswith((url, "data:")) for request in chat.requests} == {True}
    response = await chat.page.goto(url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy


async def test_text_of_a_model_never_becomes_markup(chat):
    attack = "\n\n".join(
        [
            "<img src=x onerror=alert(1)> <script>alert(1)</script>",
            "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](data:text/html,x) ![d](https://example.org/x.png)",
            "```html\n<b onclick=alert(1)>bold</b>\n```",
            "| <i>x</i> | y |\n|---|---|\n| <u>1</u> | [l](vbscript:x) |",
        ]
    )
    rendered = await chat.render(attack)
    names = await rendered.locator("*").evaluate_all("nodes => nodes.map((node) => node.localName)")
    assert not {"img", "script", "b", "i", "u"} & set(names)
    links = await rendered.locator("a").evaluate_all(
        "links => links.map((link) => [link.protocol, link.rel])"
    )
    assert links == [["https:", "noopener noreferrer"]]
    await expect(rendered).to_contain_text("<img src=x onerror=alert(1)>")
