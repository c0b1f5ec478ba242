"""Generation for the page: one job at a time, each in a thread of its own, stopped within a step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any


class Stopped(Exception):
    """Raised inside the pipeline of a job that was stopped."""


class Jobs:
    """The jobs of one pipeline, at most one for each visitor.

    They take turns: a scheduler keeps the state of one generation, and all visitors share the adapters.

    Args:
        make: pictures from the pipeline's arguments, `callback_on_step_end` among them.
    """

    def __init__(self, make: Callable[..., list[Any]]) -> None:
        self._make = make
        self._turn = threading.Lock()
        self._stops: dict[str | None, threading.Event] = {}  # by visitor

    def begin(self, visitor: str | None) -> None:
        """Let `stop` reach a visitor's job before it has its turn."""
        self._stops.setdefault(visitor, threading.Event())

    def stop(self, visitor: str | None) -> None:
        """Stop a visitor's job, if there is one."""
        self._stops.get(visitor, threading.Event()).set()

    def run(self, visitor: str | None, **arguments: Any) -> Generator[int | list[Any], None, None]:
        """Generate: the number of each step when it is done, and at last the pictures.

        Closing the generator stops the pipeline within a step, as `stop` does.

        Args:
            arguments: of `make`.
        Raises:
            Stopped: if it was.
            Exception: what `make` raises.
        """
        stopped = self._stops.setdefault(visitor, threading.Event())
        news: queue.SimpleQueue[int | list[Any] | Exception] = queue.SimpleQueue()

        def after_step(_: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            if stopped.is_set():
                raise Stopped
            news.put(step + 1)
            return state

        def work() -> None:
            try:
                with self._turn:
                    if stopped.is_set():
                        raise Stopped
                    made = self._make(**arguments, callback_on_step_end=after_step)
                news.put(made)
            except Exception as error:  # raised again in the visitor's thread
                news.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while isinstance(latest := news.get(), int):
                yield latest
            if isinstance(latest, Exception):
                raise latest
            yield latest
        finally:
            stopped.set()
            self._stops.pop(visitor, None)
