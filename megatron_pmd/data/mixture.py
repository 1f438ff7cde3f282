"""Several sources of training problems in one order, each with its share of the prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_pmd.data.problems import Key, Problem
from megatron_pmd.data.prompts import PromptOrder, PromptSource
from megatron_pmd.errors import DataError


def next_source(weights: Sequence[float], taken: Sequence[int]) -> int:
    """Which source the next prompt is of, so that after n prompts each has about its share of them.

    weights, taken: of each source; `taken` are the prompts drawn of it so far.

    Followed from the first prompt on, no source is ever 1 prompt or more away from n w_i / Σ w, nor more than
    1 − 1/(2m − 2) for m sources: the best bound there is. Of the sources that lag enough, that one is due
    first whose lag would break it first. Exact arithmetic: a resumed run rounds nothing differently.
    Source: R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980) 323-330.
    """
    exact = [Fraction(weight) for weight in weights]
    share = [weight / sum(exact) for weight in exact]
    margin = Fraction(1, max(2, 2 * len(share) - 2))
    drawn = sum(taken) + 1
    lag = [part * drawn - count for part, count in zip(share, taken, strict=True)]
    due = [i for i in range(len(share)) if lag[i] >= margin]
    return min(due, key=lambda i: ((1 - margin - lag[i]) / share[i], i))


def seed_of(run_seed: int, name: str) -> int:
    """The seed of a source's own order, in [0, 2**32). Other sources and all weights leave it as it is."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}/{name}".encode(), digest_size=4).digest())


@dataclass
class Share:
    """One source of a mixture."""

    name: str
    weight: float
    prompts: PromptSource
    taken: int = 0
    """Prompts drawn of it."""


class MixedPrompts(PromptOrder):
    """The problems of several sources, mixed by their weights: next_source says whose turn it is."""

    def __init__(self, shares: Sequence[Share]) -> None:
        """shares: at least one, of different names, none drawn from yet; each problem has its source's."""
        self._shares = list(shares)
        self._by_name = {share.name: share for share in shares}

    def __len__(self) -> int:
        return sum(len(share.prompts) for share in self._shares)

    def take(self, n: int) -> list[Problem]:
        """Neighbours may be of different sources; a prompt's whole group is of one."""
        weights = [share.weight for share in self._shares]
        turns = []
        before = [share.taken for share in self._shares]
        for _ in range(n):
            turn = next_source(weights, [share.taken for share in self._shares])
            self._shares[turn].taken += 1
            turns.append(turn)
        # together: prioritised prompts repeat none within one draw
        drawn = [
            iter(share.prompts.take(share.taken - count))
            for share, count in zip(self._shares, before, strict=True)
        ]
        return [next(drawn[turn]) for turn in turns]

    def problem(self, key: Key) -> Problem:
        return self._share_of(key).prompts.problem(key)

    def record(self, successes: Mapping[Key, float]) -> None:
        for key, rate in successes.items():
            self._share_of(key).prompts.record({key: rate})

    def _share_of(self, key: Key) -> Share:
        if key[0] not in self._by_name:
            raise DataError(
                f"problem {key[1]} is of the source {key[0]!r}; data.train has {', '.join(self._by_name)}"
            )
        return self._by_name[key[0]]

    def state(self) -> dict[str, Any]:
        """Of each source: name, weight, prompts taken, and where its own order stands."""
        return {
            "mixture": [
                {
                    "name": share.name,
                    "weight": share.weight,
                    "taken": share.taken,
                    "prompts": share.prompts.state(),
                }
                for share in self._shares
            ]
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """DataError if it is of sources of other names, weights or problems."""
        saved = state.get("mixture", [])
        was = {entry["name"]: entry["weight"] for entry in saved}
        here = {share.name: share.weight for share in self._shares}
        if list(was.items()) != list(here.items()):
            raise DataError(
                f"the saved prompt order is of the sources {_listed(was)}, this run's data.train of "
                f"{_listed(here)}: names, weights or their order changed; restore them, or start a run under "
                "another name"
            )
        for share, entry in zip(self._shares, saved, strict=True):
            share.prompts.load_state(entry["prompts"])
            share.taken = entry["taken"]


def _listed(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} (weight {weight:g})" for name, weight in weights.items()) or "no list"
