"""The process in which a library's environments are played, with an interpreter of its own."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megatron_pmd.errors import DataError, RolloutError

HOST = Path(__file__).with_name("verifiers_host.py")
LOADING_SECONDS = 1800.0
"""For an environment to be loaded, or its tasks to be listed: it may fetch a dataset."""
CLOSING_SECONDS = 15.0
"""For environments to close what they have opened."""


class EnvironmentProcess:
    """Plays the episodes of one environment, many at a time; verifiers_host.py says what it understands.

    It belongs to no event loop, so that it outlives a rollout. Use `process_of` for one that is shared.
    """

    def __init__(self, python: str, settings: dict[str, Any]) -> None:
        """Starts it, and waits until the environment is loaded.

        python: an interpreter that has the library. settings: the environment, in the library's own words.
        Raises DataError where there is no such interpreter, or its answer is that it has no such environment.
        """
        self._name = settings["taskset"]["id"]
        where = interpreter(python, self._name)
        self._numbers, self._lock = 0, threading.Lock()
        self._waiting: dict[int, Future[Any]] = {0: Future()}
        self._ended = ""
        # -P: the folder of the script is no place for imports. Programs find the tools beside their Python.
        self._process = subprocess.Popen(
            [str(where), "-P", str(HOST)],
            env=os.environ | {"PATH": f"{where.parent}{os.pathsep}{os.environ.get('PATH', '')}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.close)
        threading.Thread(target=self._listen, name=f"environment {self._name}", daemon=True).start()
        loaded = self._waiting[0]
        self._send(settings)
        self._awaited(loaded, "could not be loaded")

    def tasks(self, size: int | None) -> list[dict[str, Any]]:
        """The environment's tasks, or the first `size`, as its library writes them. Raises DataError."""
        return list(self._awaited(self._ask({"size": size})[1], "could not list its tasks"))

    def begin(self, **order: Any) -> tuple[int, Future[Any]]:
        """Begin an episode. Its reward comes, or a RuntimeError that says what failed in it.

        RolloutError when the process itself ends. order: task, base_url, api_key, model.
        """
        return self._ask(order)

    def end(self, number: int) -> None:
        """End an episode that nobody waits for any more; what it has opened is closed."""
        self._waiting.pop(number, None)
        self._send({"end": number})

    def close(self) -> None:
        """End the process, and every episode in it."""
        atexit.unregister(self.close)
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]  # a pipe
        try:
            self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # with the programs of its episodes
            self._process.wait()

    def _awaited(self, answer: Future[Any], failure: str) -> Any:
        try:
            return answer.result(LOADING_SECONDS)
        except TimeoutError:
            reason = f"it took longer than {LOADING_SECONDS:g} s"
        except (RuntimeError, RolloutError) as error:
            reason = str(error)
        self.close()
        raise DataError(f"the environment {self._name} {failure}: {reason}")

    @property
    def ended(self) -> bool:
        return bool(self._ended)

    def _ask(self, order: dict[str, Any]) -> tuple[int, Future[Any]]:
        with self._lock:
            self._numbers += 1
            number, answer = self._numbers, Future[Any]()
            self._waiting[number] = answer
        if self._ended:
            self._fail(RolloutError(self._ended))
        else:
            self._send(order | {"number": number})
        return number, answer

    def _send(self, words: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):  # a process that has ended: _listen says so
            self._process.stdin.write(json.dumps(words) + "\n")  # type: ignore[union-attr]  # a pipe
            self._process.stdin.flush()  # type: ignore[union-attr]  # a pipe

    def _listen(self) -> None:
        for line in self._process.stdout:  # type: ignore[union-attr]  # a pipe
            answer = json.loads(line)
            waiting = self._waiting.pop(answer["number"], None)
            if waiting is None or not waiting.set_running_or_notify_cancel():
                continue
            if "error" in answer:
                waiting.set_exception(RuntimeError(answer["error"]))
            else:
                waiting.set_result(answer["value"])
        code = self._process.wait()
        with contextlib.suppress(ProcessLookupError):  # the programs of its episodes, if it was killed
            os.killpg(self._process.pid, signal.SIGKILL)
        self._ended = f"the process that plays the environment {self._name} ended, with exit code {code}"
        self._fail(RolloutError(self._ended))

    def _fail(self, error: RolloutError) -> None:
        for number in [*self._waiting]:
            waiting = self._waiting.pop(number, None)
            if waiting is not None and waiting.set_running_or_notify_cancel():
                waiting.set_exception(error)


def interpreter(python: str, environment: str) -> Path:
    """Where the interpreter is that plays an environment. Raises DataError where it is not there."""
    where = Path(python).absolute()
    if not where.is_file():
        raise DataError(
            f"{where}: no such interpreter, to play {environment} with; `make verifiers` installs one, and "
            "`python` of its source names another"
        )
    return where


def process_of(python: str, settings: dict[str, Any]) -> EnvironmentProcess:
    """The one that this process has for these settings; started where there is none, or it has ended."""
    key = json.dumps([python, settings], sort_keys=True)
    with _starting:
        found = _processes.get(key)
        if found is None or found.ended:
            found = _processes[key] = EnvironmentProcess(python, settings)
        return found


_processes: dict[str, EnvironmentProcess] = {}
_starting = threading.Lock()
