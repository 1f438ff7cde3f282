"""One node of a Slurm job, `python -m megatron_pmd.node.main`: checks it, then starts its ranks.

slurm/train.sbatch sets the environment that says what to run. How the attempt ended goes into
runs/NAME/launch/outcome.json, the nodes that cannot take part into bad_nodes: node/job.py reads both.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import ConfigError, Interrupted, LayoutError, PmdError
from megatron_pmd.node.allocation import Allocation
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.processes import SAVE, hold_back

OF_ONE_NODE = (Status.FAILED, Status.REFUSED, Status.INTERRUPTED)
"""Outcomes that a node may have alone; any other comes to all nodes at once."""


def main() -> int:
    """Run this node's share; the exit code is not 0 when srun has to end the other nodes."""
    hold_back(SAVE)  # at once: Slurm may send it to this process alone; run_ranks passes it on
    signal.signal(signal.SIGTERM, _interrupt)
    allocation = Allocation.from_environment()
    try:
        outcome = _run(allocation)
    except (Exception, KeyboardInterrupt) as error:
        if not isinstance(error, (PmdError, KeyboardInterrupt)):
            traceback.print_exc()
        outcome = RunOutcome.of(error)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing but the writing of the outcome is left
    return _tell(allocation, outcome)


def _interrupt(*_: object) -> None:
    raise Interrupted("received SIGTERM")


def _run(allocation: Allocation) -> RunOutcome:
    from megatron_pmd.node import preflight
    from megatron_pmd.node.ranks import Nodes, run_ranks
    from megatron_pmd.observe.summary import is_complete

    config = _configuration()
    folder = Path(os.environ["PMD_RUNS"]) / config.name
    _check(config, folder, allocation)
    if is_complete(folder, config):
        if allocation.rank == 0:
            print(f"{folder} is complete: nothing is left to train; raise iterations to go on", flush=True)
        return RunOutcome(Status.COMPLETE)
    first = preflight.check_nodes(config, folder, allocation)[0]
    nodes = Nodes(
        count=allocation.nodes,
        rank=allocation.rank,
        ranks_per_node=allocation.ranks_per_node,
        # not its name: the other nodes may resolve it to another interface, or not at all
        rendezvous=f"{first.address}:{allocation.port}",
        attempt=allocation.attempt,
    )
    replay = os.environ.get("PMD_REPLAY")
    return run_ranks(config, folder, nodes, replay=Path(replay) if replay else None)


def _configuration() -> RunConfig:
    """Of the recipe and the settings; the run is called PMD_NAME, also where the recipe has another name."""
    from recipes import configuration

    text = os.environ.get("PMD_SETTINGS", "")
    try:
        settings = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"PMD_SETTINGS={text}: {error}; quote it as for a shell") from None
    return configuration(os.environ["PMD_RECIPE"], [f"name={json.dumps(os.environ['PMD_NAME'])}", *settings])


def _check(config: RunConfig, folder: Path, allocation: Allocation) -> None:
    if folder.resolve() != allocation.state.parent.resolve():
        raise ConfigError(
            f"PMD_NAME={allocation.state.parent.name}, but PMD_SETTINGS says name={config.name}: leave it out"
        )
    ranks = allocation.nodes * allocation.ranks_per_node
    if config.layout.ranks != ranks:
        raise LayoutError(
            f"{allocation.nodes} nodes x {allocation.ranks_per_node} ranks are {ranks} ranks; the layout of "
            f"{config.name} needs {config.layout.ranks}: ask for "
            f"{-(-config.layout.ranks // allocation.ranks_per_node)} nodes, or change layout.data"
        )


def _tell(allocation: Allocation, outcome: RunOutcome) -> int:
    """Write the outcome for the batch script; returns this node's exit code."""
    path = allocation.state / "outcome.json"
    if outcome.status not in OF_ONE_NODE:
        if allocation.rank == 0:
            outcome.write(path)
        return 0
    outcome = replace(outcome, reason=f"{allocation.host}: {outcome.reason}")
    print(outcome, file=sys.stderr, flush=True)
    # the first reason is the cause; nodes that fail after it report broken connections
    _first(path, outcome)
    return outcome.exit_code


def _first(path: Path, outcome: RunOutcome) -> None:
    """Write the outcome unless another node has written one."""
    try:
        with path.open("x") as file:
            file.write(json.dumps(outcome.as_json()) + "\n")
    except FileExistsError:
        pass


if __name__ == "__main__":
    sys.exit(main())
