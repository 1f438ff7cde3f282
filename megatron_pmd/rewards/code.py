"""Reward `code`: 1 for a program that passes every test of its problem, each run in a sandbox."""

from __future__ import annotations

import re
import threading
import time

from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.rewards.code_tests import Case, tests_of
from megatron_pmd.rewards.graders import extract
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rewards.sandbox import Sandbox, SandboxDied, first_sandbox
from megatron_pmd.rewards.stated_answer import after_thinking
from megatron_pmd.rewards.threaded import ThreadedReward

_FENCE = re.compile(r"\s*```+\s*(?P<language>[\w+#.-]*)\s*")
_PYTHON = ("", "python", "python3", "py")


class CodeReward(ThreadedReward):
    """Runs programs in `reward.workers` sandboxes at a time, one for each thread.

    A program that is wrong, fails, or needs more than its time, memory or output has the reward 0 and no
    error. An error in a verdict is about the tests or the sandbox. `with` raises MissingPackage or
    ConfigError where this node cannot make a sandbox.
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__(reward, reward.workers)
        self._mine = threading.local()
        self._all: list[Sandbox] = []

    def __enter__(self) -> CodeReward:
        try:
            with first_sandbox():
                self._threads.submit(self._sandbox).result()
        except BaseException:
            self._threads.shutdown()
            raise
        return self

    def close(self) -> None:
        for sandbox in self._all:
            sandbox.close()

    def judge(self, response: str, problem: Problem, truncated: bool) -> Verdict:
        """DataError where reward.tests_key is no column of the problem's row."""
        try:
            cases = tests_of(problem, self.reward.tests_key)
        except (ValueError, RecursionError) as error:
            return Verdict(0.0, str(error))
        program = program_in(extract(response, self.reward.answer))
        if program is None:
            return Verdict(0.0)
        try:
            return Verdict(float(self._passes(program, cases)))
        except SandboxDied:
            self._replace()
        try:
            return Verdict(float(self._passes(program, cases)))
        except SandboxDied as error:
            self._replace()
            return Verdict(0.0, f"twice with this sample: {error}")

    def _passes(self, program: str, cases: list[Case]) -> bool:
        """Whether all pass, in reward.timeout_seconds together."""
        deadline = time.monotonic() + self.reward.timeout_seconds
        for case in cases:
            left = deadline - time.monotonic()
            if left <= 0 or self.closing.is_set():
                return False
            outcome = self._sandbox().run(case.request | {"program": program}, left, case.output_bytes)
            if not (outcome.ended and case.passes(outcome.output)):
                return False
        return True

    def _sandbox(self) -> Sandbox:
        """This thread's: its processes end with the thread that started them."""
        if not hasattr(self._mine, "sandbox"):
            self._mine.sandbox = Sandbox(int(self.reward.memory_gigabytes * 1e9))
            self._all.append(self._mine.sandbox)
        return self._mine.sandbox

    def _replace(self) -> None:
        """Leave this thread without a sandbox, if it has one; the next program starts one."""
        sandbox = self._mine.__dict__.pop("sandbox", None)
        if sandbox is not None:
            self._all.remove(sandbox)
            sandbox.close()


def program_in(response: str) -> str | None:
    """The last closed Python block of a response, or all of one without a fence; None if there is none.

    A block is fenced by lines of ```; one of another language is none. Text before `</think>` does not count.
    """
    response = after_thinking(response)
    found: str | None = None
    block: list[str] | None = None
    language = ""
    fences = 0
    for line in response.splitlines():
        fence = _FENCE.fullmatch(line)
        if fence is None or (block is not None and fence["language"]):
            if block is not None:
                block.append(line)
        elif block is None:
            block, language, fences = [], fence["language"].lower(), fences + 1
        else:
            if language in _PYTHON:
                found = "\n".join(block)
            block = None
    return response if not fences else found
