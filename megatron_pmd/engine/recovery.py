"""Engines that do not come up, die or hang: which are lost, why, and starting them again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

from megatron_pmd.config import Rollout
from megatron_pmd.distributed import Control
from megatron_pmd.engine.fleet import Fleet
from megatron_pmd.engine.handover import Handover
from megatron_pmd.engine.own import OwnEngine
from megatron_pmd.engine.server import POLL_SECONDS, port_was_taken
from megatron_pmd.errors import EngineError, EngineRefused
from megatron_pmd.waiting import waiting_for

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
"""Before something is started again for the second time in a row; about doubled for each further one."""


@dataclass
class Restarts:
    """How often something that is lost may be started again, and when.

    Three count, and each waits in its own way. Here all ranks wait, with the actors off the devices.
    An engine node looks after its other engines meanwhile (node/engine_node.py). The driver trains while its
    sampler starts (training/separate_engines.py).
    """

    allowed: int
    """In a row."""
    made: int = 0
    """Since the last one that succeeded."""

    @property
    def left(self) -> bool:
        return self.made < self.allowed

    @property
    def pause_seconds(self) -> float:
        """Before the next one."""
        return RESTART_PAUSE_SECONDS * (2**self.made - 1)


class Recovery:
    """Waiting for engines, and starting them again. Collective: every actor rank calls every method."""

    def __init__(self, fleet: Fleet, handover: Handover, control: Control, rollout: Rollout) -> None:
        self._fleet, self._handover, self._control, self._rollout = fleet, handover, control, rollout

    def wait_ready(self) -> str:
        """Block until every engine answers; EngineError with the end of its log if one does not.

        EngineRefused where it is the settings that an engine cannot start with. Engines elsewhere may be
        missing, but one; returns in words which, or "".
        """
        said, failures = "", self._failures_at_start(self._fleet.engines)
        if self._fleet.elsewhere and 0 < len(failures) < len(self._fleet.engines):
            said, failures = self._follow(failures, set()), {}
        for failure in failures.values():
            # SGLang looks for free ports and opens them much later: two starts at once may find the same
            if not port_was_taken(failure):
                raise (EngineRefused if REFUSES.search(failure) else EngineError)(failure)
        if failures:
            self._replace(failures)
        self._fleet.note_urls()
        return said

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

    def restart_lost(self, *, probe: bool, before_start: Callable[[], None] = lambda: None) -> str:
        """Start every dead or stuck engine again; returns in words what was wrong, or "".

        They hold no weights yet. Engines elsewhere come back by themselves: those that are lost are left out
        while another answers, and those that answer again are taken back.
        probe: ask each whether it responds; without it, a stuck engine shows at its next call's deadline.
        before_start: called on every rank if there is one, so that the actors leave the device to it.
        Raises EngineError for one that does not come up in `rollout.restarts` attempts.
        """
        reasons, back = self._lost(probe=probe), self._answering_again()
        if not (reasons or back):
            return ""
        before_start()
        self._handover.before_restart()
        if self._fleet.elsewhere:
            said = self._follow(reasons, back)
        else:
            self._replace(reasons)
            said = f"{len(reasons)} engine(s) died and were started again: {_first_lines(reasons.values())}"
        self._fleet.note_urls()
        return said

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
        if own is None or own.number in self._fleet.left_out:
            return None
        reason = own.why_lost(probe=probe)
        return (own.number, reason) if reason else None

    def _answering_again(self) -> set[int]:
        """Of the engines that are left out, those that answer now."""
        own, left_out = self._fleet.own, self._fleet.left_out
        if not left_out:
            return set()
        again = own is not None and own.number in left_out and own.answers_again()
        found: list[int | None] = self._control.all_gather(own.number if own is not None and again else None)
        return {number for number in found if number is not None}

    def _follow(self, reasons: dict[int, str], back: set[int]) -> str:
        """Leave out these engines elsewhere, and take those back; returns the words for it.

        Waits while none is left, as long as an engine of ours may take to start; then EngineError.
        """
        fleet, rollout = self._fleet, self._rollout
        seconds = rollout.start_timeout_seconds * rollout.restarts
        fleet.kill(reasons)
        fleet.start([*reasons, *back])
        fleet.left_out = fleet.left_out - back | reasons.keys()
        begun, everybody = time.monotonic(), frozenset(fleet.engines)
        with (
            waiting_for("one of the engines elsewhere to answer", seconds)
            if self._control.is_driver
            else nullcontext()
        ):
            while fleet.left_out == everybody:
                if self._control.from_driver(time.monotonic() - begun > seconds):
                    raise EngineError(f"{next(iter(reasons.values()))}; no engine answered for {seconds:g} s")
                time.sleep(POLL_SECONDS)
                back |= (found := self._answering_again())
                fleet.left_out -= found
        said = [_first_lines(reasons.values())] if reasons else []
        if back:
            said.append(f"taken back, with the current weights: {_numbers(back)}")
        if fleet.left_out:
            said.append(f"left out until they answer: {_numbers(fleet.left_out)}")
        return "; ".join(said)

    def _replace(self, reasons: dict[int, str]) -> None:
        """Kill what is left of these engines and start them again, on other ports.

        reasons: what was wrong with each.
        """
        lost, restarts = reasons, Restarts(self._rollout.restarts)
        while restarts.left:
            self._fleet.kill(lost)
            time.sleep(restarts.pause_seconds)
            restarts.made += 1
            self._handover.note_start()
            self._fleet.start(lost)
            lost = self._failures_at_start(lost)
            if not lost:
                return
        self._fleet.kill(lost)
        number, failure = next(iter(lost.items()))
        raise EngineError(
            f"{reasons[number]}\nit was started again {restarts.made} times, in vain; "
            f"the last time: {failure}"
        )


def _first_lines(reasons: Iterable[str]) -> str:
    return "; ".join(reason.splitlines()[0] for reason in reasons)


def _numbers(engines: Collection[int]) -> str:
    """As a run counts them, which is also the order of rollout.servers."""
    return "engine " + ", ".join(map(str, sorted(engines)))
