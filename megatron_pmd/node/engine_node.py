"""One of layout.engine_nodes: `megatron-pmd engines runs/NAME --node N` starts its engines, and keeps them.

On Slurm slurm/train.sbatch runs this on each such node, beside the ranks' nodes; on one machine node/ranks.py
does. Anyone may: a node that is lost is replaced by the same command on another machine that sees the run's
folder and has its software. How the actors find the engines: engine/engine_nodes.py.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_pmd import network
from megatron_pmd.config import RunConfig, build
from megatron_pmd.engine.engine_nodes import START, Meeting, Opening, this_start
from megatron_pmd.engine.recovery import Restarts
from megatron_pmd.engine.server import free_port
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec, log_of
from megatron_pmd.errors import EngineError, Interrupted, LaunchError, LayoutError
from megatron_pmd.node.preflight import check_engine_node
from megatron_pmd.observe.summary import SUMMARY
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.processes import die_with_parent
from megatron_pmd.waiting import waiting_for

LOOK_SECONDS = 0.5
OPENING_SECONDS = 3600.0
"""For a run to want engines: that of a Slurm job may have its pre-flight and its inputs to read first."""


def serve(run: Path, node: int) -> None:
    """Serve a run until it ends: this start of it, and the next where nobody says which (START).

    Raises EngineError when no engine comes up in `rollout.restarts` attempts, LayoutError for a node that the
    run's layout does not have, LaunchError for one that cannot take part, Interrupted when told to end.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    run = run.resolve()  # the working directory will be the driver's
    meeting, start = Meeting(run), this_start()
    if start is None and meeting.opening() is None:
        _check_goes_on(run)
    with waiting_for(f"{run} to want engines", OPENING_SECONDS):
        limit = time.monotonic() + OPENING_SECONDS
        while (opening := meeting.opening(start)) is None:
            if time.monotonic() > limit:
                raise EngineError(f"{run} did not want engines within {OPENING_SECONDS:g} s; was it started?")
            time.sleep(LOOK_SECONDS)
    while opening is not None:
        _enter(run, opening)
        serving = EngineNode(run, node, opening)
        try:
            serving.keep()
        finally:
            serving.close()
        if serving.replaced:
            print(f"another process keeps the engines of node {node} now", flush=True)
            return
        opening = meeting.opening(start)


def _check_goes_on(run: Path) -> None:
    """Raises LaunchError for a run that is complete: this node would wait for a start that nobody means."""
    outcome = RunOutcome.read(run / SUMMARY)
    if outcome is not None and outcome.status is Status.COMPLETE:
        raise LaunchError(
            f"{run} is complete and wants no engines. To train further, start it with more iterations first, "
            "and then this node"
        )


def _enter(run: Path, opening: Opening) -> None:
    """Work where the driver does: paths of the configuration may be relative. LaunchError if it cannot."""
    here = socket.gethostname()
    if opening.driver == network.LOOPBACK and opening.host != here:
        raise LaunchError(
            f"{run} runs on {opening.host} alone, and listens where no other machine reaches it; launch "
            "it on Slurm to give it further nodes"
        )
    if not Path(opening.folder).is_dir():
        raise LaunchError(
            f"{run} was started in {opening.folder}, where paths of its configuration begin, and this "
            f"machine ({here}) has no such folder; share it as the run's folder is shared"
        )
    os.chdir(opening.folder)


def _interrupt(*_: object) -> None:
    raise Interrupted("received SIGTERM")


class EngineNode:
    """The engines of one node, for one start of the run."""

    def __init__(self, run: Path, node: int, opening: Opening) -> None:
        """Starts nothing yet; where _enter has been. Raises LayoutError for a node that the run's layout does
        not have, LaunchError for one that cannot take part.
        """
        config = build(opening.config)
        if not 0 <= node < config.layout.engine_nodes:
            raise LayoutError(
                f"--node {node}: {run} has layout.engine_nodes={config.layout.engine_nodes}, counted from 0"
            )
        alone = opening.driver == network.LOOPBACK
        self._run, self._node, self._opening, self._config = run, node, opening, config
        self._meeting, self._name = Meeting(run, opening.start), secrets.token_hex(4)
        wanted = () if alone else os.environ.get("PMD_INTERFACES", "").split()
        self._interface = network.choose_interface(wanted, opening.driver)
        variables = network.variables(self._interface)
        # as in the ranks' pre-flight: a profile's own are for runs of several nodes
        os.environ.update(variables if alone else variables | os.environ)
        check_engine_node(config, run, opening.software)
        self._cpu, first = not _has_cuda(), node * config.engines_per_node
        self._engines: dict[int, _Kept] = {
            number: _Kept(config.rollout.restarts) for number in range(first, first + config.engines_per_node)
        }

    @property
    def replaced(self) -> bool:
        """Whether another process, which came later, keeps this node's engines."""
        return self._meeting.keeper(self._node) not in (None, self._name)

    def keep(self) -> None:
        """Start the engines and keep them, until the run wants none or others, or another process does."""
        for number in self._engines:
            self._start(number)
        self._announce()
        while self._meeting.opening() == self._opening and not self.replaced:
            lost = [number for number in self._engines if self._is_lost(number)]
            for number in lost:
                self._start(number)
            if lost:
                self._announce()
            if all(kept.failure for kept in self._engines.values()):
                raise EngineError("; ".join(kept.failure for kept in self._engines.values()))
            time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        """End the engines."""
        for kept in self._engines.values():
            kept.stop()

    def _is_lost(self, number: int) -> bool:
        """Whether it is to be started again now."""
        kept = self._engines[number]
        return kept.may_start and (not kept.alive() or self._meeting.lost(number) == kept.url)

    def _start(self, number: int) -> None:
        kept, address = self._engines[number], self._interface.address
        kept.stop()
        port = free_port(address)
        while self._meeting.lost(number) == f"http://{address}:{port}":  # another engine was there
            port = free_port(address)
        config, log = self._config, log_of(self._run, number)
        gpu = (number % config.engines_per_node) * config.rollout.tensor_parallel
        kept.start(
            EngineSpec.of_run(
                config, number, host=address, port=port, log=log, cpu=self._cpu, keys=self._opening.keys,
                first_gpu=gpu,
            )
        )  # fmt: skip
        where = f"given up: {kept.failure}" if kept.failure else f"started at {kept.url}"
        print(f"engine {number} is {where}; log: {log}", flush=True)

    def _announce(self) -> None:
        engines = self._engines.items()
        urls = {number: kept.url for number, kept in engines if not kept.failure}
        failures = {number: kept.failure for number, kept in engines if kept.failure}
        self._meeting.announce(self._node, urls, failures, self._name)


class _Kept:
    """An engine of this node, started as often as it is lost; a thread waits until it is ready."""

    def __init__(self, restarts: int) -> None:
        self.failure = ""
        """Why it does not come up, once that is given up."""
        self._restarts, self._reason, self._not_before = Restarts(restarts), "it was lost", 0.0
        self._process: EngineProcess | None = None

    @property
    def url(self) -> str:
        return self._process.url if self._process else ""

    @property
    def may_start(self) -> bool:
        """Whether it is not given up, and the pause behind the last start that failed is over."""
        return not self.failure and time.monotonic() >= self._not_before

    def alive(self) -> bool:
        return self._process is not None and self._process.alive()

    def start(self, spec: EngineSpec) -> None:
        """Start it, or give it up once it has failed to come up too often in a row."""
        restarts = self._restarts
        if self._process is not None:
            if not restarts.left:
                self.failure = f"{self._reason}\nit was started again {restarts.made} times, in vain"
                return
            restarts.made += 1
        self._not_before = time.monotonic() + restarts.pause_seconds
        self._process = EngineProcess(spec)
        threading.Thread(target=self._wait, args=(self._process,), daemon=True).start()

    def _wait(self, process: EngineProcess) -> None:
        try:
            process.wait_ready(process.spec.rollout.start_timeout_seconds)
            self._restarts.made, self._not_before = 0, 0.0
        except EngineError as error:
            self._reason = str(error)
            process.stop()

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def engine_nodes_here(config: RunConfig, run: Path) -> Iterator[None]:
    """The run's engine nodes as processes of this machine, beside the block. Raises LayoutError with CUDA."""
    nodes = config.layout.engine_nodes
    if not nodes:
        yield
        return
    if _has_cuda():
        raise LayoutError(
            f"layout.engine_nodes={nodes} on one machine with GPUs: engines of a node of their own take its "
            "first ones, which are the ranks'. Set engine_nodes=0 and sync.transport=ipc: engines then take "
            "the GPUs behind the ranks'; or launch the run on several nodes"
        )
    children = []
    # what a start that was killed has left in the folder is not taken for this one's
    os.environ[START] = secrets.token_hex(4)
    (run / "logs").mkdir(parents=True, exist_ok=True)
    try:
        for node in range(nodes):
            with (run / "logs" / f"engine-node-{node}.log").open("ab") as log:
                command = [sys.executable, "-m", "megatron_pmd.cli.main", "engines", str(run)]
                child = subprocess.Popen(
                    [*command, "--node", str(node)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    preexec_fn=functools.partial(die_with_parent, parent=os.getpid()),
                )  # fmt: skip
                children.append(child)
        yield
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                child.kill()  # its engines end with it (engine/supervisor.py)
        for child in children:
            child.wait()
