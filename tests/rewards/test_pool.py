"""Grading in worker processes: whatever a reward does costs its own sample and nothing else."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from types import SimpleNamespace
from typing import Any, cast

import pebble
import pytest

from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError, PmdError
from megatron_pmd.rewards.pool import _FULL, ATTEMPTS, RewardPool, Verdict, _Job

PROBLEM = Problem(0, ({"role": "user", "content": "?"},), "1")

MISBEHAVING = """
import ctypes, os, sys, time
hoard = []

def score(response, problem):
    match response:
        case "raise": raise KeyError("no such unit")
        case "sys.exit": sys.exit(3)
        case "loop":
            while True: pass
        case "hang in C": sum(range(10**12))
        case "nan": return float("nan")
        case "inf": return float("inf")
        case "text": return "1.0"
        case "none": return None
        case "huge": return 10**400
        case "os._exit": os._exit(5)
        case "os._exit(0)": os._exit(0)
        case "crash": ctypes.string_at(0)
        case "pid": return os.getpid()
        case "memory": return len(bytearray(10**9))
        case "hoard": hoard.append(bytearray(15 * 10**7)); return 1
        case "true": return 2 > 1
    return float(response)
"""


@pytest.fixture(scope="module", autouse=True)
def reward_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Modules that the workers can import too: spawn hands sys.path on."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "misbehaving.py").write_text(MISBEHAVING)
    (folder / "slow_import.py").write_text("import time\ntime.sleep(1)\ndef score(r, p): return 1.0\n")
    (folder / "only_in_parent.py").write_text(
        "import multiprocessing\n"
        "if multiprocessing.parent_process(): raise RuntimeError('no licence left')\n"
        "def score(r, p): return 1.0\n"
    )
    (folder / "crashes_worker.py").write_text(
        "import multiprocessing, os\n"
        "if multiprocessing.parent_process(): os._exit(9)\n"
        "def score(r, p): return 1.0\n"
    )
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def reward(name: str = "misbehaving:score", workers: int = 1, timeout_seconds: float = 0.5) -> Reward:
    return Reward(name=name, workers=workers, timeout_seconds=timeout_seconds, memory_gigabytes=0.2)


@pytest.fixture(scope="module")
def pool(reward_modules: None) -> Iterator[RewardPool]:
    with RewardPool(reward()) as pool:
        yield pool


def verdict(pool: RewardPool, response: str) -> Verdict:
    return pool.submit(response, PROBLEM).result(timeout=20)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("raise", "KeyError: 'no such unit'"),
        ("sys.exit", "SystemExit: 3"),
        ("loop", "no verdict within 0.5 s"),
        ("hang in C", "no verdict within 0.5 s"),
        ("nan", "the reward returned nan"),
        ("inf", "the reward returned inf"),
        ("text", "the reward returned a str ('1.0'), not a number"),
        ("none", "the reward returned a NoneType (None), not a number"),
        ("huge", "OverflowError: int too large to convert to float"),
        ("os._exit", "the reward ended its worker process (exit code 5)"),
        ("os._exit(0)", "no verdict within 0.5 s"),
        ("crash", "the reward ended its worker process (exit code -11)"),
        ("memory", "it needs more than reward.memory_gigabytes=0.2"),
    ],
)
def test_a_reward_that_misbehaves_counts_as_zero_with_its_reason(pool, response, reason):
    assert verdict(pool, response) == Verdict(0.0, reason)
    assert verdict(pool, "0.25") == Verdict(0.25)


def test_a_worker_that_earlier_samples_have_filled_is_replaced(pool):
    worker = verdict(pool, "pid").reward
    assert verdict(pool, "hoard") == Verdict(1.0)
    assert verdict(pool, "pid").reward not in (0.0, worker)


def test_workers_that_are_full_one_after_another_cost_a_sample_none_of_its_attempts():
    grading, workers = RewardPool(reward(workers=4)), cast("pebble.ProcessPool", SimpleNamespace())
    grading._pool = workers
    job = _Job(lambda: Verdict(1.0), (), seconds=None)
    for _ in range(2 * ATTEMPTS):
        job.attempts += 1  # as _schedule does
        ended: Future[Verdict] = Future()
        ended.set_exception(pebble.ProcessExpired("full", code=_FULL))
        grading._settle(workers, job, ended)
    assert job.attempts == 0 and not job.verdict.done()


def test_verdicts_come_in_the_order_of_the_samples(pool):
    responses = ["1", "loop", "2", "os._exit", "3", "raise", "true"]
    verdicts = pool.grade([(response, PROBLEM) for response in responses])
    assert [v.reward for v in verdicts] == [1, 0, 2, 0, 3, 0, 1]
    assert [bool(v.error) for v in verdicts] == [False, True, False, True, False, True, False]


def test_a_problem_that_cannot_be_sent_to_a_worker_is_a_verdict(pool):
    unsendable = Problem(0, (), "", metadata={"function": lambda: None})
    outcome = pool.submit("1", unsendable).result(timeout=20)
    assert outcome.reward == 0.0 and "pickle" in (outcome.error or "")
    assert verdict(pool, "1") == Verdict(1.0)


def test_grading_can_be_awaited(pool):
    async def both() -> list[Verdict]:
        futures = [asyncio.wrap_future(pool.submit(response, PROBLEM)) for response in ("1", "nan")]
        return list(await asyncio.gather(*futures))

    assert [v.reward for v in asyncio.run(both())] == [1.0, 0.0]


def test_a_cancelled_sample_disturbs_nothing(pool):
    hanging, cancelled = pool.submit("loop", PROBLEM), pool.submit("1", PROBLEM)
    assert cancelled.cancel()
    assert hanging.result(timeout=20).error and verdict(pool, "2") == Verdict(2.0)


def test_workers_ignore_an_interrupt_from_the_terminal(pool):
    worker = int(verdict(pool, "pid").reward)
    os.kill(worker, signal.SIGINT)
    assert verdict(pool, "pid").reward == worker


def test_an_idle_worker_that_is_killed_is_replaced(pool):
    """pebble alone does not survive this: its pool then refuses every task."""
    worker = int(verdict(pool, "pid").reward)
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.3)
    assert verdict(pool, "pid").reward not in (0.0, worker)


def test_a_slow_import_is_not_charged_to_the_first_sample():
    with RewardPool(reward("slow_import:score", timeout_seconds=0.5)) as pool:
        assert pool.grade([("", PROBLEM)]) == [Verdict(1.0)]


def test_a_reward_that_cannot_be_resolved_fails_before_any_worker_starts():
    with pytest.raises(ConfigError, match="did you mean math"):
        RewardPool(reward("maths"))


def test_a_reward_that_loads_only_in_the_main_process_is_reported():
    with (
        pytest.raises(ConfigError, match=r"not in a worker: .*no licence left"),
        RewardPool(reward("only_in_parent:score")),
    ):
        pass


def test_a_reward_that_crashes_every_worker_at_its_import_is_reported():
    with (
        pytest.raises(ConfigError, match=r"not in a worker: the reward's workers died 3 times"),
        RewardPool(reward("crashes_worker:score")),
    ):
        pass


def test_workers_that_cannot_be_started_are_an_error_and_nobody_waits(monkeypatch):
    def out_of_memory(**options: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("pebble.ProcessPool", out_of_memory)
    with (
        pytest.raises(PmdError, match=r"workers cannot run: OSError.*Cannot allocate memory"),
        RewardPool(reward()),
    ):
        pass


def test_closing_cancels_what_is_not_graded_yet():
    """The problems fill the pipe to the workers (64 KiB), so pebble is stuck writing when it is stopped."""
    large = Problem(0, (), "", metadata={"page": "x" * 50_000})
    with RewardPool(reward(timeout_seconds=60)) as pool:
        futures = [pool.submit("loop", large) for _ in range(20)]
        time.sleep(0.2)
    assert all(future.cancelled() for future in futures)
    with pytest.raises(CancelledError):
        futures[0].result()
    with pytest.raises(RuntimeError, match="not open"):
        pool.submit("1", PROBLEM)


def test_a_pool_that_is_not_entered_refuses_samples():
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        RewardPool(reward()).submit("1", PROBLEM)
