"""Every wait in the package has a deadline, or stands here with what ends it (docs/troubleshooting.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_pmd"
WAITS = {"wait", "join", "result", "get", "recv", "communicate", "sigwait", "acquire"}
PROGRAMS = {"run", "call", "check_call", "check_output"}
LOCKS = {"flock", "lockf"}

WORK_OF_ITS_OWN = "a thread of this process that computes"
A_CALL = "a thread whose call to an engine or a service has a deadline"
KILLED = "a process that was just killed"
GROUP = "the process group's deadline"
TOLD = "a thread that has just been told to end"

ENDS_WITH = {
    "convert/parts.py: self._last.result()": WORK_OF_ITS_OWN,
    "convert/parts.py: future.result()": WORK_OF_ITS_OWN,
    "convert/sharded.py: writer.write_data(plan, _Source(resolve)).wait()": WORK_OF_ITS_OWN,
    "distributed.py: dist.recv(piece, rank, group=self._group)": GROUP,
    "engine/health.py: self.join()": TOLD,
    "engine/server.py: self._process.wait()": KILLED,
    "environments/process.py: self._process.wait()": "the process, which is killed or has closed its output",
    "node/engine_node.py: child.wait()": KILLED,
    "processes.py: thread.join()": TOLD,
    "rewards/code.py: self._threads.submit(self._sandbox).result()": "the start of a sandbox, which has one",
    "rewards/grading.py: future.result()": "a grading, which has a deadline",
    "rewards/pool.py: pool.join()": KILLED,
    "rewards/pool.py: self._keeper.join()": TOLD,
    "rewards/pool.py: future.result()": "a grading, whose worker is killed at its deadline",
    "rewards/pool.py: self._incoming.get()": "the pool's close, which puts something there",
    "rewards/pool.py: task.result()": "nothing: it has ended",
    "rewards/sandbox.py: self._process.wait()": KILLED,
    "rewards/sandboxed.py: thread.join()": "a program's thread, which is killed with it at its deadline",
    "rewards/service.py: known.result()": A_CALL,
    "rewards/service.py: mine.result()": "nothing: it has ended",
    "rewards/threaded.py: future.result()": "a grading, which has a deadline",
    "rollout/agents/program.py: client.stopped.wait()": "asyncio.wait around it, which has a deadline",
    "rollout/agents/program.py: episode.failed.wait()": "asyncio.wait around it, which has a deadline",
    "rollout/agents/program.py: program.result()": "nothing: it has ended",
    "rollout/generate_client.py: asyncio.wait([waiting, stopped], return_when=asyncio.FIRST_COMPLETED)": (
        "the question to a teacher, or the grading, which have deadlines"
    ),
    "rollout/generate_client.py: idle.wait()": "the rollout, whose requests have deadlines",
    "rollout/generate_client.py: self.stopped.wait()": "asyncio.wait around it",
    "rollout/generate_client.py: waiting.result()": "nothing: it has ended",
    "rollout/group_journal.py: each.result()": WORK_OF_ITS_OWN,
    "rollout/sampler.py: asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)": "the rollout",
    "rollout/sampler.py: first.pop().result()": "nothing: it has ended",
    "rollout/sampler.py: self._enough.wait()": "asyncio.timeout around it",
    "rollout/sampler.py: self._may_end.wait()": "the rollout, whose requests have deadlines",
    "rollout_file.py: begun.result()": WORK_OF_ITS_OWN,
    "rollout_file.py: self.wait()": WORK_OF_ITS_OWN,
    "training/production.py: before.wait()": "the rollout before, which sets it however it ends",
    "training/sampler_process.py: self._closed.wait()": "the driver, whose end of the pipe closes with it",
    "training/sampler_process.py: self._pipe.recv()": "the same; the driver calls it when something is there",
    "training/sampler_process.py: self._process.join()": KILLED,
    "training/phases.py: run.rollout_writer.wait()": WORK_OF_ITS_OWN,
    "training/shutdown.py: signal.sigwait({SAVE})": "the process: a thread that does nothing else",
    "weight_sync/broadcast.py: part.result()": "a call to a server or a group, which have deadlines",
    "weight_sync/bucket.py: fcntl.flock(descriptor, fcntl.LOCK_EX)": "nothing: the file is new",
    "weight_sync/exchange.py: work.wait()": GROUP,
    "weight_sync/push.py: loading.result()": A_CALL,
}
"""By file and call, what a wait without a deadline of its own ends with."""


def without_deadline(text: str) -> Iterator[str]:
    """The calls in a module that may wait, and are given no number of seconds."""
    for call in ast.walk(ast.parse(text)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        name, owner = call.func.attr, ast.unparse(call.func.value)
        has_timeout = any(keyword.arg and "timeout" in keyword.arg for keyword in call.keywords)
        if owner == "subprocess" and name in PROGRAMS:
            waits = not has_timeout
        elif name in LOCKS:
            waits = "LOCK_NB" not in ast.unparse(call)
        elif name in ("recv", "sigwait") or owner == "asyncio":
            waits = name in WAITS and not has_timeout
        else:
            waits = name in WAITS and not call.args and not has_timeout
        if waits:
            yield ast.unparse(call)


def test_every_wait_has_a_deadline_or_is_known_to_end() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {call}"
        for path in PACKAGE.rglob("*.py")
        for call in without_deadline(path.read_text())
    }
    assert found - ENDS_WITH.keys() == set(), "give it a deadline, or say here what ends it"
    assert ENDS_WITH.keys() - found == set(), "these are there no more"


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        ("process.wait()", True),
        ("process.wait(3)", False),
        ("process.wait(timeout=3)", False),
        ("subprocess.run(command, check=True)", True),
        ("subprocess.run(command, timeout=3)", False),
        ("queue.get()", True),
        ("values.get(key)", False),
        ("', '.join(words)", False),
        ("thread.join()", True),
        ("fcntl.flock(file, fcntl.LOCK_EX)", True),
        ("fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", False),
        ("signal.sigwait({SAVE})", True),
        ("signal.sigtimedwait({SAVE}, 1)", False),
        ("connection.recv()", True),
    ],
)
def test_a_wait_without_a_deadline_is_found(call: str, waits: bool) -> None:
    assert bool(list(without_deadline(call))) == waits
