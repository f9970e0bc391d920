"""Switches in the environment, and warnings that are worth saying once."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("kda_cute")

TRUE, FALSE = ("1", "true", "on", "yes"), ("0", "false", "off", "no")

_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning that this process has not logged yet: a call later the reason is the same."""
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)


def switch(name: str, default: bool) -> bool:
    """A boolean, in any case; empty is not set. Another value is ignored with a warning, as torch does with its own."""
    given = os.environ.get(name, "")
    value = given.strip().lower()
    if value in TRUE:
        return True
    if value in FALSE:
        return False
    if value:
        warn_once(f"{name} is {given!r}: must be one of {', '.join(TRUE + FALSE)}; taken as {'01'[default]}")
    return default
