"""A failure on one rank is raised on all: no rank waits for one that will not come."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_pmd.distributed import Control
from megatron_pmd.errors import EngineError, StaleWeights

WORLD = 3


def on_ranks(program: Callable[[Control], Any], meeting: Path) -> list[Any]:
    """What the program returns or raises on each of three ranks, which are forked from this process."""
    context = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(WORLD):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(program, meeting, rank, there))
        process.start()
        ranks.append((process, here))
    outcomes = [here.recv() if here.poll(60) else "nothing" for _, here in ranks]
    for process, _ in ranks:
        process.join(10)
        process.kill()
    return outcomes


def _rank(program: Callable[[Control], Any], meeting: Path, rank: int, outcome: Connection) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    try:
        result = program(Control(timeout_seconds=30))
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    outcome.send(result)
    outcome.close()
    os._exit(0)  # the parent's atexit handlers are not this process's


def test_every_rank_gets_the_results_of_all_in_rank_order(tmp_path: Path) -> None:
    results = on_ranks(lambda control: control.on_all(lambda: 10 * control.rank), tmp_path / "meeting")
    assert results == [[0, 10, 20]] * 3


@pytest.mark.parametrize("failing, message", [((2,), "EngineError: of 2"), ((1, 2), "StaleWeights: of 1")])
def test_the_first_ranks_failure_is_raised_on_all_in_its_own_class(
    tmp_path: Path, failing: tuple[int, ...], message: str
) -> None:
    def program(control: Control) -> None:
        def action() -> None:
            if control.rank in failing:
                raise (StaleWeights if control.rank == 1 else EngineError)(f"of {control.rank}")

        control.on_all(action)

    assert on_ranks(program, tmp_path / "meeting") == [message] * 3


def test_ranks_go_on_together_after_a_failure(tmp_path: Path) -> None:
    def program(control: Control) -> list[int]:
        def fail() -> None:
            raise EngineError("on all")

        with pytest.raises(EngineError):
            control.on_all(fail)
        return control.on_all(lambda: control.rank)

    assert on_ranks(program, tmp_path / "meeting") == [[0, 1, 2]] * 3


def test_a_failure_of_the_drivers_action_is_raised_on_all(tmp_path: Path) -> None:
    def program(control: Control) -> None:
        def action() -> None:
            raise EngineError(f"of {control.rank}")

        control.on_driver(action)

    assert on_ranks(program, tmp_path / "meeting") == ["EngineError: of 0"] * 3
