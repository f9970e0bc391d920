"""Plugins of servers: SGLang and vLLM find them by the entry points of this package. docs/serving.md says how to use
them. What both share is here; nothing of it may break a server."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Generator
from importlib.machinery import ModuleSpec
from logging import Logger
from types import ModuleType
from typing import Any

import torch


@contextlib.contextmanager
def harmless(log: Logger, what: str) -> Generator[None, None, None]:
    """Makes a warning of any exception."""
    try:
        yield
    except Exception as error:
        log.warning("kda_cute: %s failed, kernels of the server stay: %s: %s", what, type(error).__name__, error)


def parameters(function: Any) -> tuple[str, ...]:
    """Names of a function's parameters, in order, also of one that others have wrapped."""
    return tuple(inspect.signature(function).parameters)


class Once:
    """Log lines that are written at their first time only."""

    def __init__(self, log: Logger) -> None:
        self.log, self.said = log, set[str]()

    def warn(self, key: str, message: str, *args: object) -> None:
        if key not in self.said:
            self.said.add(key)
            self.log.warning(message, *args)

    def served(self, name: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
        """ours(), or theirs() for arguments that our functions refuse, which they do before they touch a tensor. The
        servers' parameters require gradients, which nobody wants here."""
        try:
            with torch.no_grad():
                return ours()
        except (TypeError, ValueError, NotImplementedError) as error:
            return self.left(name, str(error), theirs)

    def left(self, name: str, why: str, theirs: Callable[[], Any]) -> Any:
        self.warn(f"{name} {why[:40]}", "kda_cute: a call of %s goes to the server's own kernel: %s", name, why)
        return theirs()


class _Importing:
    """A finder that finds nothing of its own: it calls back after a module has been imported."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        callbacks = self.waiting.pop(name, None)
        if callbacks is None:
            return None
        try:  # this finder no longer knows the name: the others are asked
            spec = importlib.util.find_spec(name)
        finally:
            self.waiting[name] = callbacks
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            for callback in self.waiting.pop(name, ()):
                callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_importing = _Importing()


def when_imported(name: str, then: Callable[[ModuleType], None], log: Logger) -> None:
    """then(module) once the module has been imported; now, if it has been."""

    def callback(module: ModuleType) -> None:
        with harmless(log, f"the change of {name}"):
            then(module)

    if name in sys.modules:
        callback(sys.modules[name])
        return
    if _importing not in sys.meta_path:
        sys.meta_path.insert(0, _importing)
    _importing.waiting.setdefault(name, []).append(callback)
