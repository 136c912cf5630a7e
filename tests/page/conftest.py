"""One browser, one server and one cloud for all tests of the page: starting each takes longer than a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from tests.browser import ChatPage, open_page, running_browser
from tests.service import InProcessCloud, in_process_cloud, running_serve
from tests.tiny_pair import TinyPair

MAX_TOKENS = 40
SLOW_STEP_S = 0.08


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with running_browser() as browser:
        yield browser


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def cloud(tiny_pair: TinyPair) -> AsyncIterator[InProcessCloud]:
    async with in_process_cloud(tiny_pair.target_gguf) as cloud:
        yield cloud


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def url(tiny_pair: TinyPair, cloud: InProcessCloud) -> AsyncIterator[str]:
    with running_serve(tiny_pair.draft_gguf, cloud=cloud.address, max_tokens=MAX_TOKENS) as served:
        yield served.address
    assert served.log_lines == [""], "whatever the pages did, nothing failed in the server"


@pytest_asyncio.fixture(loop_scope="session")
async def chat(browser: Browser, url: str) -> AsyncIterator[ChatPage]:
    async with open_page(browser, url) as chat:
        yield chat


@pytest.fixture
def slow_cloud(cloud: InProcessCloud) -> Iterator[InProcessCloud]:
    """Passes of the target take a while, so that a test can act in the middle of an answer."""
    cloud.context.step_s = SLOW_STEP_S
    yield cloud
    cloud.context.step_s = 0.0
