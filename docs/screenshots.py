"""Makes the pictures of docs/web-page.md with the models of `make demo`: `python -m docs.screenshots`."""

from __future__ import annotations

import asyncio
import io
import os
from pathlib import Path

from PIL import Image
from playwright.async_api import expect

from benchmarks.services import duet_cloud, duet_serve
from tests.browser import ANSWER_WITHIN_MS, PHONE, open_page, running_browser

FOLDER = Path(__file__).parent
SIZE = {"width": 1120, "height": 700}
QUESTION = "Why is the sky blue by day and red in the evening? Answer in one short paragraph."


async def drafting(url: str, path: Path) -> None:
    """In the middle of an answer, some of it confirmed and some still a draft."""
    async with (
        running_browser() as browser,
        open_page(browser, url, viewport=SIZE, color_scheme="light") as chat,
    ):
        await chat.choose("Speculate")
        await chat.begin(QUESTION)
        await expect(chat.body).to_contain_text("light", timeout=ANSWER_WITHIN_MS)
        await chat.page.wait_for_function(
            "() => (document.querySelector('.answer .provisional')?.textContent ?? '').trim().length > 16",
            timeout=ANSWER_WITHIN_MS,
        )
        save(await chat.page.screenshot(), path)


async def answered(url: str, path: Path, **options: object) -> None:
    """A whole answer: who wrote what, and how it was made."""
    async with running_browser() as browser, open_page(browser, url, **options) as chat:
        await chat.choose("Speculate")
        await chat.ask(QUESTION)
        save(await chat.page.screenshot(), path)


def save(png: bytes, path: Path) -> None:
    """With a palette, which makes it a third as large."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(path, optimize=True)


async def main() -> None:
    os.environ["DUET_MAX_DRAFT_TOKENS"] = (
        "6"  # the speed controller would draft little on a CPU: too little to see
    )
    with duet_cloud() as (address, _), duet_serve("--cloud", address, "--max-tokens", "96") as url:
        await drafting(url, FOLDER / "web-page-drafts.png")
        await answered(url, FOLDER / "web-page-dark.png", viewport=SIZE, color_scheme="dark")
        await answered(url, FOLDER / "web-page-phone.png", viewport=PHONE, color_scheme="light")


if __name__ == "__main__":
    asyncio.run(main())
