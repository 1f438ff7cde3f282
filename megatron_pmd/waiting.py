"""What this process waits for, told once it takes long: nobody should look at a silent program and guess.

Python's library alone, also of older versions: the batch host of a Slurm job imports it with its own Python.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional, Union

PATIENCE_SECONDS = 10.0
"""So long something is waited for without a word."""
REPEAT_SECONDS = 300.0
"""Between two words about the same thing."""
LOOKS_APART_SECONDS = 1.0

Words = Union[str, Callable[[], str]]  # noqa: UP007
"""Of what is waited for; or what finds them, where they change meanwhile."""


@dataclass(eq=False)
class _Wait:
    what: Words
    begun: float
    deadline_seconds: Optional[float]  # noqa: UP045
    remark: str

    @property
    def subject(self) -> object:
        """Equal for those that are told of together."""
        return self.what if isinstance(self.what, str) else self

    def words(self, now: float) -> str:
        what = self.what if isinstance(self.what, str) else self.what()
        limit = "" if self.deadline_seconds is None else f", at most {self.deadline_seconds:.0f} s"
        return f"waiting for {what}, {now - self.begun:.0f} s so far{limit}{self.remark}"


def _to_stderr(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


class Waits:
    """The waits of a process, of whatever thread; a thread of its own looks at them while there are some."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = _to_stderr,
        *,
        watched: bool = True,
    ) -> None:
        """watched: False where the caller calls tell() itself."""
        self._clock, self._say, self._watched = clock, say, watched
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all: in a forked process, which neither waits for this nor has the thread."""
        # a signal's handler may wait, too, in the midst of another wait's beginning
        self._door = threading.RLock()
        self._waits: list[_Wait] = []
        self._told: dict[object, float] = {}
        """When something was last told, by what is waited for: many threads may wait for one thing."""
        self._thread: Optional[threading.Thread] = None  # noqa: UP045

    @contextmanager
    def waiting_for(
        self,
        what: Words,
        deadline_seconds: Optional[float] = None,  # noqa: UP045
        *,
        remark: str = "",
    ) -> Iterator[None]:
        """Around a wait: after 10 s, and then every 5 minutes, says for what.

        what: e.g. `the end of runs/x`. deadline_seconds: after which the wait gives up; None: it ends with
        something else that has one. remark: further words at the end, with what separates them.
        """
        wait = _Wait(what, self._clock(), deadline_seconds, remark)
        with self._door:
            self._waits.append(wait)
            if self._watched and self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="waits", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._door:
                self._waits.remove(wait)

    def tell(self) -> None:
        """Say what has been waited for too long, unless the same was said a short time ago."""
        now = self._clock()
        with self._door:  # no wait ends meanwhile, and takes with it what its words are read from
            late = [wait for wait in self._waits if now - wait.begun > PATIENCE_SECONDS]
            due = [(wait.subject, wait.words(now)) for wait in late]
        for subject, words in due:
            if now - self._told.get(subject, -REPEAT_SECONDS) >= REPEAT_SECONDS:
                self._told[subject] = now
                self._say(words)

    def _watch(self) -> None:
        while True:
            time.sleep(LOOKS_APART_SECONDS)
            with self._door:
                if self._thread is not threading.current_thread():
                    return
                if not self._waits:
                    self._thread = None
                    return
            self.tell()


_HERE = Waits()
waiting_for = _HERE.waiting_for
os.register_at_fork(after_in_child=_HERE.begin_anew)
