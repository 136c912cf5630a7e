"""Other sites' pages cannot use a `duet serve` on the machine of who visits them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import httpx
import pytest

from tests.browser import running_browser
from tests.counters import scraped, total

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

CHAT = {"model": "duet-local", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
ASK = """
async ([url, body, mode]) => {
  const answer = await fetch(url, { method: "POST", mode, body });
  return answer.status;
}
"""
"""A body that is a string needs no leave: browsers send it across sites, and only keep the answer back."""


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<p>a site</p>")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def another_site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        serving.join()


async def num_answers(url: str) -> float:
    return total(await scraped(urlsplit(url).netloc), "duet_edge_answers_total")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
async def test_what_another_sites_page_asks_is_refused_unread(browser, url, path):
    before = await num_answers(url)
    page = await browser.new_page()
    with another_site() as site:
        await page.goto(site)
        async with page.expect_response(f"{url}{path}") as refused:
            await page.evaluate(ASK, [f"{url}{path}", json.dumps(CHAT), "no-cors"])
        assert (await refused.value).status == 403
        await page.goto(url)
        assert await page.evaluate(ASK, [f"{url}/v1/chat/completions", json.dumps(CHAT), "cors"]) == 200
    await page.close()
    assert await num_answers(url) == before + 1, "the server's own page was served"


async def test_a_site_that_takes_this_machines_address_sees_nothing(url):
    port = urlsplit(url).port
    async with running_browser("--host-resolver-rules=MAP rebound.example 127.0.0.1") as browser:
        page = await browser.new_page()
        for path in ("/", "/v1/models", "/metrics"):
            response = await page.goto(f"http://rebound.example:{port}{path}")
            assert response.status == 403
            assert (await response.json())["error"]["code"] == "unknown_host"


async def test_a_program_is_told_why_in_openais_shape(url):
    async with httpx.AsyncClient() as client:
        response = await client.post(
            f"{url}/v1/chat/completions", json=CHAT, headers={"Origin": "https://evil.example"}
        )
    assert response.status_code == 403
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "https://evil.example may not ask" in error["message"]
