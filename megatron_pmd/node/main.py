"""One node of a Slurm job, `python -m megatron_pmd.node.main`: checks it, then starts its ranks.

slurm/train.sbatch sets the environment that says what to run; the outcome goes into files that it reads:
`outcome` (complete, saved, failed or refused), `reason` (the first failure's words), `bad_nodes`.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from pathlib import Path

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import ConfigError, DataError, LayoutError, ModelError, PmdError
from megatron_pmd.node.allocation import Place

# what a person has to mend: starting again would end the same way
REFUSALS = (ConfigError, DataError, ModelError)


def main() -> int:
    """Run this node's share; the exit code is 0 when the run is complete or saved, else 1."""
    place = Place.from_environment()
    try:
        outcome = _run(place)
    except REFUSALS as error:
        return _failed(place, "refused", f"{type(error).__name__}: {error}")
    except PmdError as error:
        return _failed(place, _kind(str(error)), str(error))
    if place.rank == 0:
        _note(place.state / "outcome", outcome)
    return 0


def _run(place: Place) -> str:
    from megatron_pmd.node import preflight
    from megatron_pmd.node.ranks import Nodes, run_ranks
    from megatron_pmd.observe.summary import is_complete
    from recipes import configuration

    config = configuration(os.environ["PMD_RECIPE"], shlex.split(os.environ.get("PMD_SETTINGS", "")))
    folder = Path(os.environ["PMD_RUNS"]) / config.name
    _check(config, folder, place)
    if is_complete(folder, config):
        if place.rank == 0:
            print(f"{folder} is complete: nothing is left to train; raise iterations to go on", flush=True)
        return "complete"
    address = preflight.check_nodes(config, folder, place).address
    replay = os.environ.get("PMD_REPLAY")
    nodes = Nodes(place.nodes, place.rank, place.ranks_per_node, place.rendezvous, place.attempt, address)
    outcome = run_ranks(config, folder, nodes, replay=Path(replay) if replay else None)
    if outcome.error:
        raise PmdError(str(outcome))
    return outcome.status.value


def _check(config: RunConfig, folder: Path, place: Place) -> None:
    if folder.resolve() != place.state.parent.resolve():
        raise ConfigError(
            f"PMD_NAME={place.state.parent.name}, but the configuration's name is {config.name}: "
            "set PMD_NAME to it"
        )
    ranks = place.nodes * place.ranks_per_node
    if config.layout.ranks != ranks:
        raise LayoutError(
            f"{place.nodes} nodes x {place.ranks_per_node} ranks are {ranks} ranks; the layout of "
            f"{config.name} needs {config.layout.ranks}: ask for "
            f"{-(-config.layout.ranks // place.ranks_per_node)} nodes, or change layout.data"
        )


def _kind(message: str) -> str:
    """A rank's own refusal comes back as the launcher's message about that rank."""
    return (
        "refused"
        if any(f"failed: {error.__name__}:" in message for error in (*REFUSALS, LayoutError))
        else "failed"
    )


def _failed(place: Place, outcome: str, message: str) -> int:
    print(f"{place.host}: {message}", file=sys.stderr, flush=True)
    # the first reason is the cause; nodes that fail after it report broken connections
    if _first(place.state / "reason", f"{place.host}: {message}"):
        _note(place.state / "outcome", outcome)
    return 1


def _first(path: Path, text: str) -> bool:
    """Write a file that no other node has written; whether this one did."""
    try:
        with path.open("x") as file:
            file.write(text + "\n")
    except FileExistsError:
        return False
    return True


def _note(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{socket.gethostname()}")
    partial.write_text(text + "\n")
    partial.replace(path)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for the ranks; their agent must outlive it
    sys.exit(main())
