"""Structured log records on standard error, one a line, the same way on both sides."""

from __future__ import annotations

import logging
import sys

import structlog

from shared.config import LogFormat, LogLevel


def configure_logging(log_format: LogFormat, log_level: LogLevel) -> None:
    """Send our records and those of libraries to standard error.

    Args:
        log_level: least severe record that is written.
    """
    level = getattr(logging, log_level.upper())
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        # The default shows local variables, and with them prompts.
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    shared_processors: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared_processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            renderer, foreign_pre_chain=[*shared_processors, structlog.stdlib.ExtraAdder()]
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
