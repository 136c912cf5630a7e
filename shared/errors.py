"""Every error that duet raises on purpose, grouped by what the caller does next.

DuetError
├── ConfigError                 do not start: change a setting
│   ├── UnknownSetting
│   ├── InvalidSetting
│   └── AddressInUse
├── ModelError                  do not start: this model file cannot be used
│   ├── UnknownModel
│   ├── ModelFileInvalid
│   ├── ModelUnsupported
│   ├── OutOfMemory
│   ├── DownloadFailed
│   ├── HashMismatch
│   └── NoDiskSpace
├── RequestError                change the request
│   ├── InvalidRequest
│   ├── PromptTooLong
│   └── EdgeOverloaded
├── CloudError                  keep the committed tokens; finish locally or resume elsewhere
│   ├── CloudUnavailable
│   ├── CloudUntrusted
│   ├── CloudOverloaded
│   ├── CloudFailed
│   ├── AccessDenied
│   ├── QuotaExceeded
│   ├── StreamExpired
│   ├── VerifyTimeout
│   └── VocabularyMismatch
└── ProtocolError               a bug on one side: end the stream, do not retry
    ├── InvalidDraft
    ├── FutureEpoch
    └── UnexpectedMessage

Messages are one line that says what happened and what to do. `TABLE` maps each leaf to the gRPC
status it travels as, to the exit code of the commands and to the HTTP status of `duet serve`; nothing
else decides any of them.
"""

from __future__ import annotations

from typing import NamedTuple


class DuetError(Exception):
    """Base of all expected failures. `str(error)` is one line for a person."""


class ConfigError(DuetError):
    """A setting is wrong, so nothing was started."""


class UnknownSetting(ConfigError):
    """A configuration source names a setting that does not exist."""


class InvalidSetting(ConfigError):
    """A setting has a value of the wrong type or out of range."""


class AddressInUse(ConfigError):
    """The address to listen on cannot be bound."""


class ModelError(DuetError):
    """A model cannot be used."""


class UnknownModel(ModelError):
    """Neither a registered name nor a file."""


class ModelFileInvalid(ModelError):
    """The file is not a model that the engine can read."""


class ModelUnsupported(ModelError):
    """A readable model without something that duet needs, such as a memory that rolls back."""


class OutOfMemory(ModelError):
    """Model and context do not fit."""


class DownloadFailed(ModelError):
    """Every source of a model failed."""


class HashMismatch(ModelError):
    """A file's sha256 is not the registered one."""


class NoDiskSpace(ModelError):
    """The cache folder's disk cannot hold the download."""


class RequestError(DuetError):
    """The request itself cannot be served."""


class InvalidRequest(RequestError):
    """A field is missing or out of range; the message names it."""


class PromptTooLong(RequestError):
    """The prompt does not fit the context."""


class EdgeOverloaded(RequestError):
    """Too many requests wait for the edge model: try again later."""


class CloudError(DuetError):
    """The cloud failed; what was committed stands."""

    def __init__(self, message: str, *, retry_after_s: float | None = None, limit: str | None = None) -> None:
        """
        Args:
            retry_after_s: when to ask again at the earliest, where the service knows.
            limit: what was used up, in the service: a limit of the tenant, `places` or `memory`.
        """
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.limit = limit


class CloudUnavailable(CloudError):
    """No service answers at the address, or it is leaving."""


class CloudUntrusted(CloudError):
    """The service cannot prove who it is, or does not encrypt: nothing was sent."""


class CloudOverloaded(CloudError):
    """The service has no room for another stream."""


class CloudFailed(CloudError):
    """The service had an internal failure."""


class AccessDenied(CloudError):
    """The service does not know the caller: no token, a wrong or an expired one."""


class QuotaExceeded(CloudError):
    """The caller has used up what it may have at a time."""


class StreamExpired(CloudError):
    """The edge was silent, did not read, or took longer in all than a stream may."""


class VerifyTimeout(CloudError):
    """The service did not answer in time."""


class VocabularyMismatch(CloudError):
    """Draft and target tokens do not mean the same bytes."""


class ProtocolError(DuetError):
    """A message that the state of the stream does not allow."""


class InvalidDraft(ProtocolError):
    """A draft with a wrong start, an unknown token id or too many tokens."""


class FutureEpoch(ProtocolError):
    """A draft of an epoch that the cloud has not announced."""


class UnexpectedMessage(ProtocolError):
    """A message that is illegal in this state, whatever its content."""


class Outcome(NamedTuple):
    """What an error becomes at the three boundaries."""

    grpc_status: str
    """Name in grpc.StatusCode."""
    exit_code: int
    http_status: int = 500


TABLE: dict[type[DuetError], Outcome] = {
    UnknownSetting: Outcome("FAILED_PRECONDITION", 2),
    InvalidSetting: Outcome("FAILED_PRECONDITION", 2),
    AddressInUse: Outcome("FAILED_PRECONDITION", 2),
    UnknownModel: Outcome("FAILED_PRECONDITION", 3),
    ModelFileInvalid: Outcome("FAILED_PRECONDITION", 3),
    ModelUnsupported: Outcome("FAILED_PRECONDITION", 3),
    OutOfMemory: Outcome("FAILED_PRECONDITION", 3),
    DownloadFailed: Outcome("FAILED_PRECONDITION", 3),
    HashMismatch: Outcome("FAILED_PRECONDITION", 3),
    NoDiskSpace: Outcome("FAILED_PRECONDITION", 3),
    InvalidRequest: Outcome("INVALID_ARGUMENT", 4, 400),
    PromptTooLong: Outcome("INVALID_ARGUMENT", 4, 400),
    EdgeOverloaded: Outcome("RESOURCE_EXHAUSTED", 4, 429),
    CloudUnavailable: Outcome("UNAVAILABLE", 5, 503),
    CloudOverloaded: Outcome("RESOURCE_EXHAUSTED", 5, 429),
    CloudFailed: Outcome("INTERNAL", 5, 502),
    CloudUntrusted: Outcome("UNAUTHENTICATED", 5, 502),
    AccessDenied: Outcome("UNAUTHENTICATED", 5, 502),
    QuotaExceeded: Outcome("RESOURCE_EXHAUSTED", 5, 429),
    StreamExpired: Outcome("DEADLINE_EXCEEDED", 5, 504),
    VerifyTimeout: Outcome("DEADLINE_EXCEEDED", 5, 504),
    VocabularyMismatch: Outcome("FAILED_PRECONDITION", 6, 502),
    InvalidDraft: Outcome("INVALID_ARGUMENT", 7, 502),
    FutureEpoch: Outcome("ABORTED", 7, 502),
    UnexpectedMessage: Outcome("ABORTED", 7, 502),
}

EXIT_INTERNAL = 70
"""A failure that duet did not expect (EX_SOFTWARE of sysexits.h)."""

EXIT_INTERRUPTED = 130
"""Ctrl-C, by the shell's convention (128 + SIGINT)."""

_LEAVES_BY_NAME = {leaf.__name__: leaf for leaf in TABLE}
_FALLBACK_BY_STATUS: dict[str, type[DuetError]] = {
    "UNAVAILABLE": CloudUnavailable,
    "DEADLINE_EXCEEDED": VerifyTimeout,
    "RESOURCE_EXHAUSTED": CloudOverloaded,
    "INVALID_ARGUMENT": InvalidRequest,
    "UNAUTHENTICATED": AccessDenied,
    "ABORTED": UnexpectedMessage,
}


def outcome(error: DuetError) -> Outcome:
    """Look up what an error becomes. Subclasses of a leaf share its row."""
    for cls in type(error).__mro__:
        if cls in TABLE:
            return TABLE[cls]
    raise KeyError(f"{type(error).__name__} has no row in shared.errors.TABLE")


def from_status(
    grpc_status: str, message: str, kind: str | None = None, retry_after_s: float | None = None
) -> DuetError:
    """Rebuild the error that the other side raised.

    Args:
        grpc_status: name in grpc.StatusCode.
        message: the status's details.
        kind: class name of the error where the peer sent it along; statuses are shared by several leaves.
        retry_after_s: likewise; see `CloudError`.
    """
    cls = _LEAVES_BY_NAME.get(kind or "") or _FALLBACK_BY_STATUS.get(grpc_status, CloudFailed)
    return cls(message, retry_after_s=retry_after_s) if issubclass(cls, CloudError) else cls(message)
