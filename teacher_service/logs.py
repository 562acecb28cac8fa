"""Logs of the actors: JSON lines on stderr, which Ray keeps for each process under the session's ``logs/``.

Every line has ``time`` (UTC), ``level``, ``event`` and the dataset's ``fingerprint``; a shard's have ``shard`` too.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

_LOGGER = logging.getLogger("teacher_service.actor")


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {"time": time, "level": record.levelname, "event": record.getMessage()}
        return json.dumps(fields | getattr(record, "fields", {}), ensure_ascii=False)


def start_logging() -> None:
    """For a process that is an actor's alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False


class ActorLog:
    """What an actor does, for one dataset."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint

    def info(self, event: str, **fields: Any) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields)

    def _log(self, level: int, event: str, fields: dict[str, Any]) -> None:
        _LOGGER.log(level, event, extra={"fields": {"fingerprint": self._fingerprint, **fields}})
