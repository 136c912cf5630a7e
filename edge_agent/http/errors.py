"""Every failure of `duet serve` in OpenAI's shape; nothing else makes an error response.

The status of an expected failure is in `shared.errors.TABLE`.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from shared.config import REQUEST_SETTINGS
from shared.errors import DuetError, InvalidRequest, PromptTooLong, outcome
from shared.shaping import PENALTIES

log = logging.getLogger("duet.http")

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""Other 4xx are `invalid_request_error`, 5xx `server_error`."""


class ApiError(Exception):
    """A request that this server refuses by itself."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        """
        Args:
            param: the parameter that is to blame, as OpenAI names it: `messages.0.role`.
            code: for programs.
        """
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


def as_api_error(error: BaseException) -> ApiError:
    """Any failure as one that a client may be told; what was not expected is logged, and not named."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, DuetError):
        code = "context_length_exceeded" if isinstance(error, PromptTooLong) else _snake(type(error).__name__)
        param = _blamed(error) if isinstance(error, InvalidRequest) else None
        return ApiError(str(error), status=outcome(error).http_status, param=param, code=code)
    if isinstance(error, HTTPException):
        return ApiError(error.detail, status=error.status_code)
    log.error("internal failure", exc_info=error)
    return ApiError("the server failed internally; its log says more", status=500, code="internal_error")


def error_body(error: ApiError) -> dict[str, Any]:
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(_: Request, error: BaseException) -> Response:
    """For Starlette's table of exception handlers."""
    found = as_api_error(error)
    headers = {"WWW-Authenticate": "Bearer"} if found.status == 401 else None
    return JSONResponse(error_body(found), found.status, headers)


def _invalid(error: ValidationError) -> ApiError:
    """The first of what is wrong; pydantic's own words, with the parameter in front."""
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(
            f"{param} is not a parameter that this server supports", param=param, code="unknown_parameter"
        )
    if first["type"] == "missing":
        return ApiError(f"{param} is missing", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(f"{param}: {message}", param=param, code="invalid_value")


def _blamed(error: InvalidRequest) -> str | None:
    """The parameter that the message begins with, if it does."""
    name = re.split(r"[\s:,]", str(error), maxsplit=1)[0]
    if name in ("json_schema", "grammar"):
        return "response_format" if name == "json_schema" else name
    return name if name in REQUEST_SETTINGS | PENALTIES | {"prompt"} else None


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
