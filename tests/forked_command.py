"""`megatron-pmd WORDS` in a process forked from one that has imported everything (tests/warm_command.py)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

PROJECT = Path(__file__).parents[1]
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["tests.warm_command"])


class ForkedCommand:
    """A command that has been started in a session of its own, as subprocess.Popen would show it."""

    def __init__(
        self,
        words: list[str],
        folder: Path,
        output: Path,
        environment: Mapping[str, str],
        errors: Path | None = None,
    ) -> None:
        """output, errors: files for what it prints; errors None: both go to the first."""
        self._output = output
        files = (output, errors or output)
        self._process = FORK_SERVER.Process(target=_run, args=(words, folder, files, dict(environment)))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float = 60.0) -> tuple[str, None]:
        """What was printed, once it has ended. Raises TimeoutError if it does not."""
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutError(f"not ended after {timeout} s: {self._output.read_text()}")
        return self._output.read_text(), None


def _run(words: list[str], folder: Path, files: tuple[Path, Path], environment: dict[str, str]) -> None:
    """In the forked process, which ends with the command's exit code."""
    from megatron_pmd.cli.main import main

    # what a shell starts in the background ignores Ctrl-C: the tests, and then this process too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    os.chdir(folder)
    for standard, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), standard)
    os.environ.update(environment, PYTHONPATH=str(PROJECT))
    sys.argv = ["megatron-pmd", *words]
    main()
