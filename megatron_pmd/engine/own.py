"""The engine that this rank runs, or its part of one over several nodes. Nothing here is collective."""

from __future__ import annotations

from megatron_pmd.config import RunConfig
from megatron_pmd.device import device_memory
from megatron_pmd.engine.control import EngineControl, Tag
from megatron_pmd.engine.device_memory import EngineMemory
from megatron_pmd.engine.engine_nodes import AnnouncedEngine, Meeting
from megatron_pmd.engine.external import Engine, ExternalEngine
from megatron_pmd.engine.health import Watch
from megatron_pmd.engine.placement import EnginePart
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec, engine_options
from megatron_pmd.errors import EngineError
from megatron_pmd.observe.subphases import SubphaseClock
from megatron_pmd.processes import tree_bytes


class OwnEngine:
    """A server process, the calls to it, what it holds in memory, and who watches it while it generates."""

    process: Engine

    def __init__(self, part: EnginePart, config: RunConfig, clock: SubphaseClock, meeting: Meeting) -> None:
        """Starts nothing yet. clock: measures what is handed over. meeting: with the run's engine nodes."""
        self.part, self._rollout, self._meeting = part, config.rollout, meeting
        self._per_node = config.engines_per_node
        self.elsewhere = config.engines_elsewhere
        """Whether this process has not started it: then it keeps its memory."""
        self._timeout_seconds = config.sync.timeout_seconds
        self._memory = EngineMemory(clock, config.sync.timeout_seconds)
        self._calls: EngineControl | None = None
        self._watch: Watch | None = None

    @property
    def number(self) -> int:
        """Counts the engines of a run from 0."""
        return self.part.engine

    @property
    def calls(self) -> EngineControl:
        """Its control endpoints, on its leader, where it now is."""
        assert self.part.leads, "only a leader calls an engine"
        if self._calls is None or self._calls.spec != self.process.spec:
            self._hang_up()
            self._calls = EngineControl(self.process.spec, self._timeout_seconds)
        return self._calls

    def _hang_up(self) -> None:
        if self._calls is not None:
            self._calls.close()
            self._calls = None

    def start(self, spec: EngineSpec) -> None:
        """Start the server, or find the one elsewhere; it answers later. ConfigError for a wrong option."""
        if self._per_node:
            engine_options(spec)  # here, where all ranks get to know what is wrong with them
            self.process = AnnouncedEngine(spec, self.number // self._per_node, self._meeting)
        else:
            self.process = ExternalEngine(spec) if self.elsewhere else EngineProcess(spec)
        self._memory.begin()
        self._hang_up()

    def kill(self) -> None:
        """End the server; one of others is only left alone, and one on an engine node is started again there.

        Calls of it fail until start() has found it again.
        """
        self.unwatch()
        self.process.stop()

    def watch(self) -> None:
        """Watch the engine from now on; only while all its memory is resident."""
        self.unwatch()
        self._watch = Watch(
            self.process, self.calls.spec, self._rollout.health_interval_seconds,
            self._rollout.health_timeout_seconds,
        )  # fmt: skip

    def unwatch(self) -> None:
        """No health check is under way after this: one that generates on released memory kills the engine."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def release(self, *kinds: Tag) -> None:
        """Give these kinds of memory up, in this order; what it does not hold stays as it is."""
        self.unwatch()
        if not self.elsewhere:
            self._memory.release(self.calls, kinds)

    def resume(self, *kinds: Tag) -> None:
        """Take these kinds of memory back, in this order; what it holds already stays as it is."""
        if not self.elsewhere:
            self._memory.resume(self.calls, kinds)

    def why_lost(self, *, probe: bool) -> str | None:
        """What is wrong with the engine, or its part here, if it is dead or stuck; None if nothing is.

        probe: also ask it whether it responds.
        """
        if self._watch is not None and self._watch.reason:
            return self._watch.reason
        try:
            self.process.check_alive()
        except EngineError as died:
            return str(died)
        seconds = self._rollout.health_timeout_seconds
        if not probe or not self.part.leads or self.calls.responds(seconds):
            return None
        return f"engine {self.number} ({self.process.url}) did not answer within {seconds:g} s"

    def answers_again(self) -> bool:
        """Whether an engine elsewhere that was left out responds, maybe at another address than before."""
        announced = self.process if isinstance(self.process, AnnouncedEngine) else None
        if announced:
            announced.find()
        if self.why_lost(probe=True) is None:
            return True
        if announced and announced.alive():
            announced.note_silence()
        return False

    def engine_bytes(self) -> int:
        """Memory of the server; with CUDA what others than this rank hold of its device."""
        if isinstance(self.process, ExternalEngine):
            return 0
        if not self.process.spec.cpu:
            return device_memory().others
        return tree_bytes(self.process.pid) if self.process.alive() else 0
