"""Logging set-up of the server, and warnings about unknown environment variables."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

import structlog

from interlock.config import Config
from interlock.config_file import unknown_variables

_LOG = structlog.get_logger(__name__)


def configure_logging(config: Config) -> None:
    """Log to standard error, as text or as JSON."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if config.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    if not any(isinstance(handler, _OfLibraries) for handler in logging.root.handlers):
        logging.root.addHandler(_OfLibraries(logging.WARNING))


CAUSED_BY_CLIENTS = frozenset(
    {"Invalid UTF-8 sequence received from client.", "ASGI callable returned without completing handshake."}
)
"""Messages that uvicorn logs as errors when a WebSocket client sends invalid data or disconnects early."""


class _OfLibraries(logging.Handler):
    """Forwards the `logging` messages of libraries to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message in CAUSED_BY_CLIENTS:
            _LOG.info(message, library=record.name)
        else:
            _LOG.log(record.levelno, message, library=record.name, exc_info=record.exc_info)


def warn_of_variables(environment: Mapping[str, str]) -> None:
    """Log the unknown environment variables that look like Interlock's."""
    for name, near in unknown_variables(environment).items():
        _LOG.warning("unknown variable ignored", variable=name, did_you_mean=near)
