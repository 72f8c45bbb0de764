"""The server's log: where it goes, in which form, and what is said there of the server's own surroundings."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

import structlog

from interlock.config import Config, unknown_variables

_LOG = structlog.get_logger(__name__)


def configure_logging(config: Config) -> None:
    """Send what the server has to say to standard error, as lines for people or as JSON."""
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


class _OfLibraries(logging.Handler):
    """Has what libraries say by Python's own logging come out as everything else does."""

    def emit(self, record: logging.LogRecord) -> None:
        _LOG.log(record.levelno, record.getMessage(), library=record.name, exc_info=record.exc_info)


def warn_of_variables(environment: Mapping[str, str]) -> None:
    """Log which variables look like Interlock's and mean nothing."""
    for name, near in unknown_variables(environment).items():
        _LOG.warning("an unknown variable is ignored", variable=name, did_you_mean=near)
