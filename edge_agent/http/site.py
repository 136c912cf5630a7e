"""The web page at `/`: its files as they are, and the headers that keep it to itself."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).with_name("page")
# Nothing from another host, no inline script: model text could not run even if it became markup.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Asked for anew each time, and answered with 304 where it did not change.
    "Cache-Control": "no-cache",
}


def page_routes() -> list[BaseRoute]:
    """For whoever asks, with the key or without."""
    return [Route("/", _index), Mount("/page", _PageFiles(directory=FOLDER))]


async def _index(_: Request) -> Response:
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


class _PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
