"""Engines that do not come up, die or hang: which are lost, why, and starting them again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection

from megatron_pmd.config import Rollout
from megatron_pmd.distributed import Control
from megatron_pmd.engine.fleet import Fleet
from megatron_pmd.engine.handover import Handover
from megatron_pmd.engine.own import OwnEngine
from megatron_pmd.engine.server import port_was_taken
from megatron_pmd.errors import EngineError, EngineRefused

REFUSES = re.compile(
    # 137: SGLang's server kills itself when its scheduler raises
    r"exited with status (1|2|137) at start;.*^("
    # argparse's, and what SGLang's and transformers' own checks raise
    r"[^\n]*: error: |(AssertionError|AttributeError|ImportError|KeyError|ModuleNotFoundError"
    r"|NotImplementedError|TypeError|ValueError)\b)",
    re.MULTILINE | re.DOTALL,
)
"""An engine that ended itself with one of these as its last words: it would at every start. A device or a
network that fails shows as RuntimeError or OSError, and one that the system killed says nothing."""
RESTART_PAUSE_SECONDS = 2.0
"""Before the second attempt to start an engine again; about doubled for each further one."""


class Recovery:
    """Waiting for engines, and starting them again. Collective: every actor rank calls every method."""

    def __init__(self, fleet: Fleet, handover: Handover, control: Control, rollout: Rollout) -> None:
        self._fleet, self._handover, self._control, self._rollout = fleet, handover, control, rollout

    def wait_ready(self) -> None:
        """Block until every engine answers; EngineError with the end of its log if one does not.

        EngineRefused where it is the settings that an engine cannot start with.
        """
        failures = self._failures_at_start(self._fleet.engines)
        for failure in failures.values():
            # SGLang looks for free ports and opens them much later: two starts at once may find the same
            if not port_was_taken(failure):
                raise (EngineRefused if REFUSES.search(failure) else EngineError)(failure)
        if failures:
            self._replace(failures)
        self._fleet.note_urls()

    def _failures_at_start(self, engines: Collection[int]) -> dict[int, str]:
        """Wait until these engines answer; by engine, why one does not."""

        def wait(own: OwnEngine) -> tuple[int, str] | None:
            if own.number in engines:
                try:
                    own.process.wait_ready(self._rollout.start_timeout_seconds)
                except EngineError as error:
                    return own.number, str(error)
            return None

        failures = dict(filter(None, self._fleet.on_leaders(wait)))
        # a part that died on another node may be the reason why the first one's process waited in vain
        others = self._control.all_gather(None if self._fleet.leads else self._own_loss(probe=False))
        for number, reason in filter(None, others):
            if number in failures:
                failures[number] += f"\n{reason}"
        return failures

    def restart_lost(self, *, probe: bool, before_start: Callable[[], None] = lambda: None) -> list[str]:
        """Start every dead or stuck engine again; returns what was wrong with each. They hold no weights yet.

        probe: ask each whether it responds; without it, a stuck engine shows at its next call's deadline.
        before_start: called on every rank if there is one, so that the actors leave the device to it.
        Raises EngineError for one that does not come up in `rollout.restarts` attempts.
        """
        reasons = self._lost(probe=probe)
        if reasons:
            before_start()
            self._handover.before_restart()
            self._replace(reasons)
            self._fleet.note_urls()
        return list(reasons.values())

    def any_lost(self) -> bool:
        """Whether an engine is dead or stuck."""
        return bool(self._lost(probe=True))

    def _lost(self, *, probe: bool) -> dict[int, str]:
        """By engine, what is wrong with it, or with its part on one of its nodes."""
        found: dict[int, str] = {}
        for number, reason in filter(None, self._control.all_gather(self._own_loss(probe=probe))):
            found.setdefault(number, reason)
        return found

    def _own_loss(self, *, probe: bool) -> tuple[int, str] | None:
        """The number of this rank's engine, and what is wrong with it or its part on this node."""
        own = self._fleet.own
        reason = own.why_lost(probe=probe) if own is not None else None
        return (own.number, reason) if own is not None and reason else None

    def _replace(self, reasons: dict[int, str]) -> None:
        """Kill what is left of these engines and start them again, on other ports.

        reasons: what was wrong with each.
        """
        lost = reasons
        for attempt in range(self._rollout.restarts):
            self._fleet.kill(lost)
            time.sleep(RESTART_PAUSE_SECONDS * (2**attempt - 1))
            self._handover.note_start()
            self._fleet.start(lost)
            lost = self._failures_at_start(lost)
            if not lost:
                return
        self._fleet.kill(lost)
        number, failure = next(iter(lost.items()))
        raise EngineError(
            f"{reasons[number]}\nit was started again {self._rollout.restarts} times, in vain; "
            f"the last time: {failure}"
        )
