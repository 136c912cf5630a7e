"""First text on the web page: the first dim token of `speculate` against the first token of `local`.

Both are timed inside the page, in Chromium: from the key that sends the question to the first text that the
page puts on the screen.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys

from benchmarks.harness import save, summarise
from benchmarks.link_proxy import LinkProxy, Phase, Schedule
from benchmarks.services import duet_cloud, duet_serve
from tests.browser import ChatPage, open_page, running_browser

ALLOWED_MS = 50
QUESTION = "Question {number}: why is the sky blue in the day and red in the evening? Answer in a paragraph."
FIRST_TEXT = """
() => new Promise((resolve) => {
  let sent = null;
  const seen = new MutationObserver(() => {
    const text = document.querySelector(".answer .provisional, .answer .piece");
    if (sent === null || !text) return;
    seen.disconnect();
    // What is in the document now is painted with this frame.
    requestAnimationFrame(() => resolve({ ms: performance.now() - sent, dim: text.matches(".provisional") }));
  });
  seen.observe(document.querySelector("#transcript"), { childList: true, subtree: true });
  addEventListener("keydown", (event) => { sent = event.timeStamp; }, { once: true, capture: true });
})
"""


async def first_text_ms(chat: ChatPage, mode: str, number: int) -> float:
    """Ask a question that no cache knows, in a new chat; stopped once its first text is there."""
    await chat.page.get_by_role("button", name="New chat").click()
    await chat.choose(mode)
    await chat.question.fill(QUESTION.format(number=number))
    timing = asyncio.create_task(chat.page.evaluate(FIRST_TEXT))
    await chat.page.evaluate("1")  # the page handles calls in turn: the observer is there before the key
    await chat.question.press("Enter")
    seen = await timing
    assert seen["dim"] == (mode == "Speculate"), "a draft is shown before anything is confirmed"
    await chat.page.keyboard.press("Escape")
    await chat.send.wait_for()
    return float(seen["ms"])


async def measure(url: str, repeats: int) -> list[str]:
    """Medians of both, and of their differences and ratios pair by pair."""
    pairs = []
    async with running_browser() as browser, open_page(browser, url) as chat:
        for number in range(repeats + 1):
            local = await first_text_ms(chat, "Local", 2 * number)
            pairs.append((local, await first_text_ms(chat, "Speculate", 2 * number + 1)))
    measured = pairs[1:]  # the first warms up
    return [
        summarise([local for local, _ in measured]).show("{:.0f}"),
        summarise([dim for _, dim in measured]).show("{:.0f}"),
        summarise([dim - local for local, dim in measured]).show("{:.0f}"),
        summarise([dim / local for local, dim in measured]).show(),
    ]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rtt-ms", type=float, nargs="+", default=[0.0, 20.0, 80.0])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    rows = []
    with duet_cloud() as (address, _):
        for rtt_ms in arguments.rtt_ms:
            schedule = Schedule(phases=[Phase(rtt_ms=rtt_ms)])
            async with LinkProxy(schedule, listen="127.0.0.1:0", to=address) as link:
                with duet_serve("--cloud", link.address) as url:
                    rows.append([f"{rtt_ms:.0f}", *await measure(url, arguments.repeats)])
    save(
        "page_ttft",
        command=shlex.join(["python", "-m", "benchmarks.page_ttft", *sys.argv[1:]]),
        title="First text on the web page",
        notes=f"In Chromium, from the key to the frame that shows it; {arguments.repeats} pairs in turn, a"
        " question of about 55 tokens that no cache knows, milliseconds as median (interval), difference and"
        f" ratio pair by pair. Edge and cloud share this machine. Aim: at most {ALLOWED_MS} ms later.",
        columns=["round trip, ms", "local, first token", "speculate, first dim token", "later by", "ratio"],
        rows=rows,
    )


if __name__ == "__main__":
    asyncio.run(main())
