"""Chromium for the tests of the web page, and the page as somebody uses it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Locator, Page, Request, async_playwright, expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--disable-sync",
)
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 375, "height": 720}
ANSWER_WITHIN_MS = 60_000

RENDER = """
async (text) => {
  const { Answer } = await import("/page/answer.js");
  const { Renderer } = await import("/page/render.js");
  const answer = new Answer("local", 0);
  answer.apply({ type: "text", text, origin: "local", thinking: false }, 0);
  const root = document.querySelector("#transcript").appendChild(document.createElement("div"));
  root.id = "rendered";
  root.className = "body";
  new Renderer(root).update(answer, 0);
}
"""


def browser_path() -> str:
    """Path of an installed browser: `CHROMIUM`, or the first that is found."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert path, "no Chromium or Chrome was found; ci/install-chromium.sh installs it"
    return path


@asynccontextmanager
async def running_browser(*flags: str) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=browser_path(), args=[*FLAGS, *flags])
        try:
            yield browser
        finally:
            await browser.close()


@dataclass
class ChatPage:
    """The page in a browser context of its own."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    """What the browser wrote to its console as an error, and what scripts threw."""
    requests: list[Request] = field(default_factory=list)

    @property
    def question(self) -> Locator:
        return self.page.get_by_role("textbox", name="Your question")

    @property
    def send(self) -> Locator:
        return self.page.get_by_role("button", name="Send")

    @property
    def stop(self) -> Locator:
        return self.page.get_by_role("button", name="Stop")

    @property
    def answers(self) -> Locator:
        return self.page.get_by_role("article", name="Answer")

    @property
    def answer(self) -> Locator:
        """The last one."""
        return self.answers.last

    @property
    def body(self) -> Locator:
        """The last answer's text."""
        return self.answer.locator(".body")

    @property
    def details(self) -> Locator:
        return self.page.get_by_role("region", name="Details")

    def mode(self, name: str) -> Locator:
        return self.page.get_by_role("radio", name=name)

    async def choose(self, mode: str) -> None:
        await self.page.locator("#modes label", has_text=mode).click()
        await expect(self.mode(mode)).to_be_checked()

    async def begin(self, question: str) -> None:
        """Type a question and press Enter."""
        await self.question.fill(question)
        await self.question.press("Enter")

    async def ask(self, question: str) -> list[dict[str, Any]]:
        """Type a question and wait for the whole answer; the events that the server sent for it."""
        async with self.page.expect_request_finished(is_chat, timeout=ANSWER_WITHIN_MS) as finished:
            await self.begin(question)
        await expect(self.answer.locator(".summary")).to_be_visible()
        response = await (await finished.value).response()
        assert response is not None
        return [json.loads(line) for line in (await response.text()).splitlines()]

    async def setting(self, name: str) -> Locator:
        """A field of the settings' dialog, which is opened."""
        await self.page.get_by_role("button", name="Settings").click()
        return self.page.get_by_role("dialog", name="Settings").get_by_label(name)

    async def save_settings(self) -> None:
        await self.page.get_by_role("button", name="Save").click()

    async def render(self, text: str) -> Locator:
        """Show a text as an answer of the edge; the element that it was put in."""
        await self.page.evaluate(RENDER, text)
        return self.page.locator("#rendered")

    async def style(self, target: Locator, *properties: str) -> tuple[str, ...]:
        """Values in force of CSS properties."""
        values = await target.evaluate(
            "(node, names) => names.map((name) => getComputedStyle(node)[name])", list(properties)
        )
        return tuple(values)

    async def accessibility_problems(self) -> list[str]:
        """What axe-core finds fault with, its best practices included."""
        results = await Axe().run(self.page)
        return [
            f"{problem['id']}: {node['html'][:200]}"
            for problem in results.response["violations"]
            for node in problem["nodes"]
        ]


def is_chat(request: Request) -> bool:
    return request.method == "POST" and request.url.endswith("/chat")


@asynccontextmanager
async def open_page(browser: Browser, url: str, **options: Any) -> AsyncIterator[ChatPage]:
    """Open the page afresh; it must not have complained by the end.

    Args:
        options: of the browser context, for example `color_scheme="dark"`.
    """
    context = await browser.new_context(**{"viewport": DESKTOP, **options})
    page = await context.new_page()
    chat = ChatPage(page)
    page.on("pageerror", lambda error: chat.complaints.append(str(error)))
    page.on(
        "console", lambda message: chat.complaints.append(message.text) if message.type == "error" else None
    )
    page.on("request", lambda request: chat.requests.append(request))
    try:
        await page.goto(url)
        await expect(chat.mode("Auto")).to_be_visible()
        yield chat
        assert chat.complaints == []
    finally:
        await context.close()
