"""A run, played: the order of training/loop.py, with engines that decode event by event beside it.

Overlapped runs of staleness n, as training/production.py: at most (n + 1) x prompts_per_rollout groups are in
the run, those that are being trained on included, so new ones begin after an update. The trainer takes the
groups that were begun first, once all of them are complete.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_pmd.errors import ConfigError
from megatron_pmd.simulator.accounts import Accounts, Played, Times
from megatron_pmd.simulator.engines import Engines
from megatron_pmd.simulator.groups import Group, Groups, Record, Response
from megatron_pmd.simulator.lengths import Lengths
from megatron_pmd.simulator.scenario import Scenario

FUTILE_STARTS = 100
"""From one iteration, without a checkpoint behind it: hardly any later start would come to one."""


class RunLost(Exception):
    """A device of the trainer has failed."""


@dataclass(frozen=True)
class _Checkpoint:
    """What a run goes on from, and when it was made."""

    completed: int
    now: float
    groups: Sequence[Record]
    accounts: Accounts
    times: Times
    staleness: Counter[int]
    readable_from: float
    """When its last file is on the disk."""


def play(scenario: Scenario, lengths: Lengths, iterations: int, seed: int, warm_up: int = 0) -> Played:
    """Play so many iterations; the first warm_up ones do not count in the times.

    Raises ConfigError where the run fails so often that it does not come to its next checkpoint.
    """
    run = _Run(scenario, lengths, seed)
    measured_from, ends, trained = Times(), [0.0] * iterations, [0] * iterations
    starts: Counter[int] = Counter()
    while run.completed < iterations:
        try:
            run.iterate()
        except RunLost:
            run.restart()
            starts[run.completed] += 1
            if starts[run.completed] == FUTILE_STARTS:
                raise ConfigError(_futile(scenario, run.completed)) from None
            continue
        ends[run.completed - 1], trained[run.completed - 1] = run.now, run.times_now().samples
        if run.completed == warm_up:
            measured_from = run.times_now()
    return Played(
        scenario,
        run.accounts_now(),
        run.times_now() - measured_from,
        tuple(ends),
        tuple(trained),
        run.staleness,
        run.failures,
        run.engine_failures,
        run.engines.decoded,
    )


def _futile(scenario: Scenario, completed: int) -> str:
    seconds = 1 / (scenario.failures.per_device_second * scenario.trainer.devices)
    return (
        f"the {scenario.mode} run fails every {seconds:,.0f} s on average, and was started "
        f"{FUTILE_STARTS} times from iteration {completed} without coming to its next checkpoint: save "
        "more often (checkpoint.every), or play failures that are rarer (--device-hours)"
    )


class _Run:
    def __init__(self, scenario: Scenario, lengths: Lengths, seed: int) -> None:
        self._scenario = scenario
        self._groups = Groups(scenario.rules, lengths, random.Random(seed))
        # a source of its own: the same seed draws the same lengths with and without failures
        self._bad_luck = random.Random(f"failures {seed}")
        self.engines = Engines(scenario.fleet.count, scenario.fleet.step_seconds)
        self.now, self.completed = 0.0, 0
        self._accounts, self._times, self.staleness = Accounts(), Times(), Counter[int]()
        self.failures = self.engine_failures = 0
        self._repairs: list[tuple[float, int]] = []
        self._draw_failures()
        self._checkpoint = self._written = self._recorded(readable_from=0.0)

    def _draw_failures(self) -> None:
        rate, fleet = self._scenario.failures.per_device_second, self._scenario.fleet
        apart = self._scenario.mode == "overlapped"
        self._run_fails = self.now + self._seconds_until_failure(rate * self._scenario.trainer.devices)
        self._engine_rate = rate * fleet.count * fleet.devices_each if apart else 0.0
        self._engine_fails = self.now + self._seconds_until_failure(self._engine_rate)

    def _seconds_until_failure(self, rate: float) -> float:
        return self._bad_luck.expovariate(rate) if rate else math.inf

    # one iteration

    def iterate(self) -> None:
        """From the begin of new groups to the sync. Raises RunLost."""
        rules, begun = self._scenario.rules, self.now
        if rules.staleness is None:
            self._sample_in_turn()
        else:
            self._sample_beside(rules.staleness)
        self._times.waiting += self.now - begun
        self._train(self._groups.take())
        self.completed += 1
        if rules.save_every and self.completed % rules.save_every == 0:
            self._save()
        self._sync()

    def _sample_in_turn(self) -> None:
        """Colocated: a rollout of its own, until it is full, or as rollout.partial says."""
        rules = self._scenario.rules
        partial, extra = rules.partial, 0
        if partial is not None:
            self._groups.begin_stale_anew(self.completed, self._accounts)
            extra = partial.extra_groups
        lacking = rules.prompts_per_rollout + extra - len(self._groups)
        self._groups.begin(lacking, self._accounts)
        deadline = self.now + ((partial.deadline_seconds if partial else None) or math.inf)
        self._submit(self._groups.open, partial.max_new_tokens if partial else None)
        self._pass(deadline, lambda: self._is_full or not self.engines.open)
        self._pass(math.inf, lambda: self._may_end or not self.engines.open)
        while not self._may_end:  # what is unfinished has used up its budget
            self._submit(self._groups.open, None)
            self._pass(math.inf, lambda: self._may_end or not self.engines.open)
        self.engines.stop(self.now)

    @property
    def _is_full(self) -> bool:
        return self._groups.complete >= self._scenario.rules.prompts_per_rollout

    @property
    def _may_end(self) -> bool:
        rules = self._scenario.rules
        return self._is_full or (
            rules.partial is not None and self._groups.complete >= rules.prompts_per_step
        )

    def _sample_beside(self, staleness: int) -> None:
        """Overlapped: engines have gone on; wait until the rollout is complete."""
        lacking = (staleness + 1) * self._scenario.rules.prompts_per_rollout - len(self._groups)
        self._submit(self._groups.begin(lacking, self._accounts), None)
        self._groups.note_due()
        self._pass(math.inf, lambda: self._groups.are_due_complete)

    def _submit(self, responses: Sequence[Response], budget: int | None) -> None:
        for response in responses:
            response.goal = (
                response.tokens if budget is None else min(response.tokens, response.done + budget)
            )
        self.engines.version = self.completed
        self.engines.submit(self.now, responses)

    def _train(self, rollout: Sequence[Group]) -> None:
        trainer = self._scenario.trainer
        responses = [response for group in rollout for response in group.responses]
        sampled = sum(group.tokens for group in rollout)
        prompts = sum(group.prompt_tokens * len(group.responses) for group in rollout)
        self.staleness.update(self.completed - response.version for response in responses)
        self._accounts.trained += len(responses)
        self._accounts.trained_tokens += sampled
        self._times.samples += len(responses)
        self._times.response_tokens += sampled
        self._spend("syncing", trainer.release)
        self._spend("training", trainer.per_token * (sampled + prompts))

    def _save(self) -> None:
        """A checkpoint; it is readable once it is written. The one before has to be."""
        begun = self.now
        self._pass(max(self.now, self._checkpoint.readable_from))
        self._written = self._checkpoint
        self._pass(self.now + self._scenario.trainer.save)
        self._times.saving += self.now - begun
        self._checkpoint = self._recorded(readable_from=self.now + self._scenario.trainer.write)

    def _sync(self) -> None:
        """Nothing is decoded meanwhile."""
        self.engines.pause(self.now)
        self._spend("syncing", self._scenario.trainer.sync)
        self.engines.resume(self.now, version=self.completed)

    # time

    def _spend(self, name: str, seconds: float) -> None:
        self._pass(self.now + seconds)
        setattr(self._times, name, getattr(self._times, name) + seconds)

    def _pass(self, until: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, until then or until it is enough, and what happens in it happen. Raises RunLost."""
        while not enough():
            ends, repaired = self.engines.next_end, min(self._repairs, default=(math.inf, 0))[0]
            moment = min(ends, repaired, self._engine_fails, self._run_fails, until)
            assert moment < math.inf, "nothing is left to wait for"
            self.now = moment
            if moment == until:
                return
            if moment == ends:
                for response in self.engines.take_ended():
                    self._groups.note_end(response)
            elif moment == repaired:
                number = self._repairs.pop(self._repairs.index(min(self._repairs)))[1]
                self.engines.mend(number, self.now)
            elif moment == self._engine_fails:
                self._lose_engine()
            else:
                raise RunLost

    # failures

    def _lose_engine(self) -> None:
        self._engine_fails = self.now + self._seconds_until_failure(self._engine_rate)
        number = self._bad_luck.randrange(len(self.engines))
        if not self.engines.is_down(number):
            self.engine_failures += 1
            self._accounts.lost_tokens += self.engines.lose(number, self.now)
            self._repairs.append((self.now + self._scenario.failures.restart_seconds, number))

    def _recorded(self, readable_from: float) -> _Checkpoint:
        self.engines.note_progress(self.now)
        accounts = self.accounts_now()
        return _Checkpoint(
            self.completed, self.now, self._groups.records, accounts, self.times_now(), self.staleness.copy(),
            readable_from,
        )  # fmt: skip

    def restart(self) -> None:
        """Go back to the newest checkpoint that is readable; all engines begin anew with what it holds."""
        self.failures += 1
        saved = self._checkpoint if self._checkpoint.readable_from <= self.now else self._written
        before, then = self.accounts_now(), saved.accounts
        self.engines.stop(self.now)
        self.engines.working_seconds = saved.times.engines_working
        self.engines.slot_seconds = saved.times.slots_in_use
        self._groups.restore(saved.groups)
        lost_tokens = before.kept_tokens - self._groups.kept_tokens
        lost_tokens += before.trained_tokens - then.trained_tokens
        lost_tokens += before.dropped_tokens - then.dropped_tokens
        self._accounts = replace(
            then,
            started=before.started,
            lost=then.lost + before.started - then.started,
            lost_tokens=before.lost_tokens + lost_tokens,
        )
        self.completed, self.staleness = saved.completed, saved.staleness.copy()
        lost = self._times.lost + self.now - saved.now
        restart = self._scenario.failures.restart_seconds
        self.now += restart
        self._times = replace(saved.times, lost=lost + restart)
        # the next failure costs the time since now: what this one cost is counted
        again = replace(saved, readable_from=0.0, now=self.now, times=self.times_now())
        self._checkpoint = self._written = again
        self._repairs.clear()
        self._mend_engines()
        self._draw_failures()
        if self._scenario.mode == "overlapped":
            self._submit(self._groups.open, None)

    def _mend_engines(self) -> None:
        self.engines.paused = True
        self.engines.resume(self.now, version=self.completed)
        for number in range(len(self.engines)):
            if self.engines.is_down(number):
                self.engines.mend(number, self.now)

    # what has come of it

    def times_now(self) -> Times:
        return replace(
            self._times,
            seconds=self.now,
            engines_working=self.engines.working_seconds,
            slots_in_use=self.engines.slot_seconds,
        )

    def accounts_now(self) -> Accounts:
        self.engines.note_progress(self.now)
        size = self._scenario.rules.samples_per_prompt
        return replace(
            self._accounts,
            waiting=self._groups.complete * size,
            in_flight=(len(self._groups) - self._groups.complete) * size,
            kept_tokens=self._groups.kept_tokens,
        )
