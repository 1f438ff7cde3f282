"""The sampler is killed with SIGKILL at random moments; another one goes on with its journal of groups."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import CheckpointError, RolloutError
from megatron_pmd.rollout import sampler as sampling
from megatron_pmd.rollout.carried_over_file import read_groups
from megatron_pmd.rollout.group_journal import FOLDER, GroupJournal
from megatron_pmd.rollout.groups import Group, RolloutGroups
from megatron_pmd.training.flow import Flow
from megatron_pmd.training.production import Ahead, Production
from tests.rollout.test_sampler import Grading, Numbers
from tests.training.test_production import PROMPTS, SAMPLES, configured, endpoint, prompts, run, update
from tools.bench.stub_engine import STOP_TOKEN, StubEngine, serving

STALENESS, KILLS = 2, 5


@pytest.fixture(autouse=True)
def _stop_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "stop_tokens", lambda tokenizer, path: [STOP_TOKEN])


def by_problem(response: str, problem: Any) -> float:
    """Every fifth problem's groups have equal rewards."""
    return 1.0 if problem.index % 5 == 0 else float(sum(map(int, response.split())) % 2)


class Life:
    """One process that samples, until it is killed; the test is its driver."""

    def __init__(self, config: RunConfig, folder: Path, ahead: Ahead, version: int, url: str) -> None:
        context = multiprocessing.get_context("forkserver")  # what the process imports is imported once
        context.set_forkserver_preload([__name__])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_live, args=(config, folder, ahead, version, url, theirs))
        self.process.start()
        theirs.close()

    def publish(self, version: int) -> Callable[[], None]:
        def tell() -> None:
            self.pipe.send(("publish", version))
            assert self.pipe.recv() == version

        return tell

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _live(config: RunConfig, folder: Path, ahead: Ahead, version: int, url: str, pipe: Connection) -> None:
    sampling.stop_tokens = lambda tokenizer, model_path: [STOP_TOKEN]

    async def body() -> None:
        order, journal = prompts(), GroupJournal(folder)
        producing = Production(config, order, ahead, Numbers(), Grading(by_problem), journal, version)
        producing.publish(version, 0, endpoint(url))
        while True:
            command, number = await asyncio.to_thread(pipe.recv)
            if command == "publish":
                producing.publish(number, 0, endpoint(url))
                await asyncio.to_thread(pipe.send, number)
                continue
            rollout = await producing.take(number)
            answer = rollout, producing.ahead(responses=False), producing.flow()
            await asyncio.to_thread(pipe.send, answer)

    with contextlib.suppress(EOFError):
        asyncio.run(body())


@dataclass
class Trained:
    """What came of a run whose sampler was killed after a random time, again and again."""

    rollouts: list[RolloutGroups] = field(default_factory=list)
    flow: Flow = field(default_factory=Flow)
    kills: int = 0
    asked_again: int = 0
    """Requests for responses that were in the journal when the process before was killed."""
    restored: int = 0
    """Tokens that were taken from the journal."""


def trained(config: RunConfig, folder: Path, engine: StubEngine, url: str, seed: int) -> Trained:
    moments, ahead, result = random.Random(seed), Ahead(0, prompts().state(), []), Trained()
    received, journals, known = Flow(), [(0, set[int]())], set[str]()
    life, ends = Life(config, folder, ahead, 0, url), moments.randint(1, PROMPTS)
    while (t := len(result.rollouts)) < config.iterations:
        try:
            life.pipe.send(("take", t))
            patience = time.monotonic() + 2.0
            while result.kills < KILLS and time.monotonic() < patience:
                if len(in_journal(folder) - known) >= ends:
                    time.sleep(moments.uniform(0, 0.05))
                    raise EOFError  # perhaps with the answer on its way
                time.sleep(0.005)
            rollout, ahead, result.flow = life.pipe.recv()
        except (EOFError, OSError):
            life.kill()
            result.kills += 1
            known = in_journal(folder)
            journals.append((len(engine.requests), {m.seed for g in groups_in(folder) for m in g.members}))
            life, ends = Life(config, folder, ahead, t, url), moments.randint(1, PROMPTS)
            continue
        result.rollouts.append(rollout)
        result.restored += rollout.accounts.restored_tokens
        received.put("trained", (member for group in rollout.chosen for member in group.members))
        result.flow.check_handed_over(received)
        asyncio.run(update(engine, url, t + 1, life.publish(t + 1)))
        assert len(list((folder / FOLDER).iterdir())) <= (STALENESS + 2) * (PROMPTS + 3), "it is bounded"
    life.kill()
    for first, seeds in journals:
        asked = [request["sampling_params"]["sampling_seed"] for request in engine.requests[first:]]
        result.asked_again += len(seeds.intersection(asked))
    return result


def in_journal(folder: Path) -> set[str]:
    """Keys of the groups."""
    return {path.stem for path in (folder / FOLDER).glob("*.parquet")}


def groups_in(folder: Path) -> list[Group]:
    """Once nobody writes there."""
    groups = [
        read_groups(folder / FOLDER / f"{key}.parquet", prompts().problem) for key in in_journal(folder)
    ]
    assert all(len(found) == 1 for found in groups)
    assert all(g.complete and len(g.members) == SAMPLES for (g,) in groups), "whole or absent"
    return [group for (group,) in groups]


def test_a_sampler_killed_at_random_moments_gives_every_response_once_and_repeats_no_complete_group(
    tmp_path: Path,
) -> None:
    engine = StubEngine(median_tokens=60, sigma=0.6, tokens_per_second=400, slots=12, keep_requests=True)
    with serving(engine) as url:
        result = trained(configured(STALENESS), tmp_path, engine, url, seed=0)
        samples = [sample for rollout in result.rollouts for sample in rollout.samples(Numbers())]
        for sample in samples:
            whole = [engine.token(sample.seed, i) for i in range(engine.length(sample.seed))]
            assert sample.response_tokens.tolist() == whole
    assert result.kills > 2 and result.restored > 0
    assert [sample.problem for sample in samples[::SAMPLES]] == list(range(6 * PROMPTS))
    assert len({sample.seed for sample in samples}) == len(samples) == 6 * PROMPTS * SAMPLES
    assert result.asked_again == 0
    for t, rollout in enumerate(result.rollouts):
        rollout.check()
        versions = {g.weight_version for s in rollout.samples(Numbers()) for g in s.segments}
        assert versions <= set(range(max(0, t - STALENESS), t + 1))


def test_dropped_groups_of_a_killed_sampler_are_dropped_again_and_the_accounts_hold(tmp_path: Path) -> None:
    config = configured(STALENESS, **{"rollout.group_filter.max_dropped": 3})
    engine = StubEngine(median_tokens=60, sigma=0.6, tokens_per_second=400, slots=12, keep_requests=True)
    with serving(engine) as url:
        result = trained(config, tmp_path, engine, url, seed=2)
    assert result.kills > 2 and result.restored > 0
    groups = [group for rollout in result.rollouts for group in rollout.chosen]
    assert len({group.problem.index for group in groups}) == len(groups) == 6 * PROMPTS
    assert len({m.seed for group in groups for m in group.members}) == 6 * PROMPTS * SAMPLES
    assert result.flow.responses["dropped_group_filter"] > 0
    assert result.flow.responses["trained"] == 6 * PROMPTS * SAMPLES
    result.flow.check(answers_under_way=False)


def test_a_run_that_goes_on_from_a_checkpoint_takes_nothing_of_weights_that_it_will_have_anew(
    tmp_path: Path,
) -> None:
    """Rollouts 0 to 2 are begun with weights 0. Some groups meet the update to weights 1, which the resumed
    run computes once more, perhaps not bit for bit; those that do not are taken as they are."""
    engine = StubEngine(median_tokens=60, sigma=0.6, tokens_per_second=300, slots=9, keep_requests=True)

    def producing(ahead: Ahead) -> Production:
        journal = GroupJournal(tmp_path)
        return Production(configured(2), prompts(), ahead, Numbers(), Grading(by_problem), journal, 0)

    async def first() -> None:
        life = producing(Ahead(0, prompts().state(), []))
        life.publish(0, 0, endpoint(url))
        while not any(key.startswith("1-") for key in in_journal(tmp_path)):
            await asyncio.sleep(0.01)
        await update(engine, url, 1, lambda: life.publish(1, 0, endpoint(url)))
        while not any(key.startswith("3-") for key in in_journal(tmp_path)):
            await asyncio.sleep(0.01)

    async def second() -> None:
        resumed = producing(Ahead(0, prompts().state(), []))
        resumed.publish(0, 0, endpoint(url))
        asked.append(len(engine.requests))
        rollouts = [await resumed.take(t) for t in range(3)]
        samples = [sample for rollout in rollouts for sample in rollout.samples(Numbers())]
        assert {g.weight_version for s in samples for g in s.segments} == {0}
        assert len({s.seed for s in samples}) == 3 * PROMPTS * SAMPLES
        assert sum(rollout.accounts.restored_tokens for rollout in rollouts) == kept

    asked: list[int] = []
    with serving(engine) as url:
        run(first)
        groups = groups_in(tmp_path)
        of_first = [g for g in groups if all(m.last_version == 0 for m in g.members)]
        kept = sum(member.length for group in of_first for member in group.members)
        assert 0 < len(of_first) < len(groups)
        engine.weight_version = "0"
        run(second)
    again = [request["sampling_params"]["sampling_seed"] for request in engine.requests[asked[0] :]]
    assert not {m.seed for group in of_first for m in group.members}.intersection(again)


def test_a_journal_that_cannot_be_written_or_read_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    journal = GroupJournal(tmp_path)
    assert journal.read(prompts().problem, lambda _: True) == {}
    group = Group(0, 0, prompts().take(1)[0], [])
    shutil.rmtree(tmp_path / FOLDER)
    journal.add(group)
    with pytest.raises(FileNotFoundError):
        journal.wait()
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "0-1.parquet.partial").write_bytes(b"cut off by a kill")
    assert journal.read(prompts().problem, lambda _: True) == {}
    (tmp_path / FOLDER / "0-0.parquet").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"0-0\.parquet: cannot be read"):
        journal.read(prompts().problem, lambda _: True)


def test_accounts_that_do_not_hold_are_an_error_that_says_what_is_lost(tmp_path: Path) -> None:
    async def body() -> None:
        order, journal = prompts(), GroupJournal(tmp_path)
        ahead = Ahead(0, order.state(), [])
        producing = Production(configured(1), order, ahead, Numbers(), Grading(by_problem), journal, 0)
        producing.publish(0, 0, endpoint(url))
        taken = await producing.take(0)
        flow = producing.flow()
        assert flow.responses["trained"] == PROMPTS * SAMPLES
        assert flow.responses["waiting"] + flow.responses["in_flight"] == PROMPTS * SAMPLES
        handed = Flow()
        handed.put("trained", (m for group in taken.chosen[1:] for m in group.members))
        with pytest.raises(RolloutError, match="handed over 12 responses so far, the driver got 9"):
            flow.check_handed_over(handed)
        (rollout, drawing), *_ = producing._begun.values()
        await drawing
        lost = rollout.groups.pop()
        with pytest.raises(RolloutError, match=r"responses that were sampled ahead .* 24 came and 21 are"):
            producing.flow()
        rollout.groups.append(lost)
        producing.flow()
        turn = lost.members[0].turns[0]
        turn.tokens = turn.tokens[:-1]
        with pytest.raises(RolloutError, match="tokens that were sampled ahead were lost or counted twice"):
            producing.flow()

    with serving(StubEngine()) as url:
        run(body)
