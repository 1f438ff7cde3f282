"""Which prompt comes next: rendering to tokens, the order over epochs, and the seed of each sample."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_pmd.config import Sampling
from megatron_pmd.data.problems import Key, Problem
from megatron_pmd.errors import DataError
from megatron_pmd.plugins import did_you_mean

if TYPE_CHECKING:
    import numpy as np


def tokenize(
    problems: list[Problem],
    tokenizer: Any,
    max_prompt_tokens: int,
    limited_by: str = "batch.max_prompt_tokens",
) -> tuple[list[Problem], int]:
    """Render each problem's chat, ready for generation, and drop the ones longer than max_prompt_tokens.

    limited_by: the setting that this limit is of, for the message.

    Returns the kept problems with their tokens, and how many were dropped. Raises DataError if none is left,
    if the tokenizer (a Hugging Face one) has no chat template, or if that refuses a problem's messages or
    does not read one of its template arguments.
    """
    need_chat_template(tokenizer)
    for problem in problems[:1]:
        _refuse_unread(problem.template_arguments, tokenizer)
    kept, lengths = [], []
    for problem in problems:
        try:
            # transformers 5 returns a dictionary with an attention mask unless told otherwise
            tokens = tokenizer.apply_chat_template(
                list(problem.messages),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **problem.template_arguments,
            )
        except Exception as error:  # jinja's, or whatever the template's own raise_exception or code leads to
            roles = ", ".join(message["role"] for message in problem.messages)
            raise DataError(
                f"problem {problem.index}: the chat template refuses its messages ({roles}): {error}"
            ) from error
        lengths.append(len(tokens))
        if len(tokens) <= max_prompt_tokens:
            kept.append(dataclasses.replace(problem, tokens=tuple(tokens)))
    if not kept:
        raise DataError(
            f"all {len(problems)} prompts are longer than {limited_by}={max_prompt_tokens}; "
            f"the shortest has {min(lengths)} tokens, the longest {max(lengths)}: raise it"
            if problems
            else "no problems to tokenise"
        )
    return kept, len(problems) - len(kept)


def need_chat_template(tokenizer: Any) -> None:
    """DataError for a tokenizer without one."""
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or "this model"
        raise DataError(
            f"the tokenizer of {name} has no chat template; put a chat_template.jinja into its folder "
            "(a base model can take its instruct model's), or set chat_template in tokenizer_config.json"
        )


def _refuse_unread(arguments: dict[str, Any], tokenizer: Any) -> None:
    """DataError for an argument that the template does not read: it would change nothing, silently."""
    template = tokenizer.get_chat_template() if arguments else ""
    for name in arguments:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            near = did_you_mean(name, set(re.findall(r"\b[a-z]\w+\b", template)))
            raise DataError(
                f"data.template_arguments.{name}: the chat template of this model reads no {name}{near}; "
                "correct or remove it"
            )


class PromptOrder(ABC):
    """An endless, reproducible sequence of problems."""

    @abstractmethod
    def __len__(self) -> int:
        """Different problems in it."""

    @abstractmethod
    def take(self, n: int) -> list[Problem]:
        """The next n problems."""

    @abstractmethod
    def problem(self, key: Key) -> Problem:
        """The problem of this source and index. DataError if it is not among these."""

    @abstractmethod
    def record(self, successes: Mapping[Key, float]) -> None:
        """How problems went: success rate in [0, 1] of each."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where the sequence stands, in JSON values, and of which data."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. DataError if it is of another sequence."""

    def peek(self, n: int) -> list[Problem]:
        """The next n problems, which take() will give again."""
        state = self.state()
        try:
            return self.take(n)
        finally:
            self.load_state(state)


class PromptSource(PromptOrder):
    """The problems of one source, epoch after epoch; `sampling` is their order."""

    def __init__(self, problems: list[Problem], seed: int, sampling: Sampling = "uniform") -> None:
        """Start at epoch 0.

        uniform      each epoch is shuffled anew, from (seed, epoch)
        in_order     every epoch in the order given
        curriculum   epoch 0 by problem.difficulty, easiest first, equals shuffled; later epochs as uniform

        Raises DataError if there is no problem, or one without the difficulty that a curriculum needs.
        """
        if not problems:
            raise DataError("a prompt source needs at least one problem")
        if sampling == "curriculum" and any(p.difficulty is None for p in problems):
            lacking = next(p.index for p in problems if p.difficulty is None)
            raise DataError(f"problem {lacking} has no difficulty: data.sampling=curriculum cannot place it")
        self._problems = list(problems)
        self._seed = seed
        self._sampling = sampling
        self._epoch = 0
        self._cursor = 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """Problems in one epoch."""
        return len(self._problems)

    def take(self, n: int) -> list[Problem]:
        """The next n problems; goes on into the next epoch where this one ends."""
        taken: list[Problem] = []
        while len(taken) < n:
            here = self._order[self._cursor : self._cursor + n - len(taken)]
            taken += [self._problems[i] for i in here]
            self._cursor += len(here)
            if self._cursor == len(self._problems):
                self._epoch, self._cursor = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
        return taken

    def problem(self, key: Key) -> Problem:
        found = self._by_key.get(key)
        if found is None:
            raise DataError(f"problem {key[1]} is not among the {len(self)} of this run's data")
        return found

    def record(self, successes: Mapping[Key, float]) -> None:
        """These orders do not depend on it."""

    def state(self) -> dict[str, Any]:
        """Where the sequence stands, in JSON values: epoch, cursor (problems taken of it), of which data."""
        return {"epoch": self._epoch, "cursor": self._cursor, **self._identity()}

    def load_state(self, state: dict[str, Any]) -> None:
        """DataError if it is of other problems, seed or sampling."""
        self._refuse_another(state)
        epoch, cursor = state["epoch"], state["cursor"]
        if not (
            type(epoch) is int and epoch >= 0 and type(cursor) is int and 0 <= cursor < len(self._problems)
        ):
            raise DataError(
                f"the saved prompt order is at epoch {epoch!r}, problem {cursor!r} of {len(self._problems)}"
            )
        self._epoch, self._cursor = epoch, cursor
        self._order = self._order_of(epoch)

    def _identity(self) -> dict[str, Any]:
        """What a saved state must have been taken of."""
        return {
            "seed": self._seed,
            "sampling": self._sampling,
            "problems": len(self._problems),
            "fingerprint": self._fingerprint,
        }

    def _refuse_another(self, state: dict[str, Any]) -> None:
        if missing := [key for key in self.state() if key not in state]:
            raise DataError(f"the saved prompt order lacks {', '.join(missing)}; it is not of this program")
        for key, here in self._identity().items():
            if state[key] != here:
                raise DataError(
                    f"the saved prompt order has {key}={state[key]}, this run {here}: the "
                    "data, the tokenizer, data.sampling or the seed changed; restore them, or start a run "
                    "under another name"
                )

    def _order_of(self, epoch: int) -> np.ndarray:
        import numpy as np

        if self._sampling == "in_order":
            return np.arange(len(self._problems))
        shuffled = np.random.default_rng(np.random.SeedSequence([self._seed, epoch])).permutation(
            len(self._problems)
        )
        if self._sampling == "curriculum" and epoch == 0:
            difficulty = np.array([p.difficulty for p in self._problems], np.float64)
            return shuffled[np.argsort(difficulty[shuffled], kind="stable")]
        return shuffled

    @functools.cached_property
    def _by_key(self) -> dict[Key, Problem]:
        return {problem.key: problem for problem in self._problems}

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for p in self._problems:
            # not metadata: some of reasoning-gym's lists a set, in another order in each process
            content = [p.index, p.messages, p.answer, p.tokens, p.difficulty, p.token_budget]
            digest.update(json.dumps(content, default=str).encode())
        return digest.hexdigest()


class PrioritisedPrompts(PromptSource):
    """Problems drawn with probability ∝ 1 − success rate: what is solved comes back no more (Kimi K1.5).

    The success rate is that of the problem's latest group; a problem not tried yet counts as never solved.
    """

    def __init__(self, problems: list[Problem], seed: int) -> None:
        super().__init__(problems, seed, "prioritised")
        self._draws = 0
        self._place = {p.key: place for place, p in enumerate(self._problems)}
        self._success = [0.0] * len(self._problems)

    def take(self, n: int) -> list[Problem]:
        """n problems, none twice while others with weight are left; the solved ones only when all are."""
        import numpy as np

        rng = np.random.default_rng(np.random.SeedSequence([self._seed, self._draws]))
        weight = 1.0 - np.array(self._success)
        unsolved, solved = np.flatnonzero(weight > 0), np.flatnonzero(weight <= 0)
        first = unsolved
        if len(unsolved):  # numpy refuses chances whose sum is 0
            chances = weight[unsolved] / weight[unsolved].sum()
            first = rng.choice(unsolved, min(n, len(unsolved)), replace=False, p=chances)
        order = np.resize(np.concatenate([first, rng.permutation(solved)]), n)
        taken = [self._problems[i] for i in order]
        self._draws += n
        return taken

    def record(self, successes: Mapping[Key, float]) -> None:
        for key, rate in successes.items():
            self.problem(key)  # a replayed rollout may be of others
            self._success[self._place[key]] = rate

    def state(self) -> dict[str, Any]:
        """How many were drawn, and every problem's success rate."""
        return {"draws": self._draws, "success": list(self._success), **self._identity()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._refuse_another(state)
        if len(state["success"]) != len(self._problems):
            raise DataError(f"the saved prompt order has {len(state['success'])} success rates")
        self._draws, self._success = state["draws"], list(state["success"])


def prompt_source(problems: list[Problem], seed: int, sampling: Sampling) -> PromptSource:
    """The source of training prompts that `data.sampling` names."""
    if sampling == "prioritised":
        return PrioritisedPrompts(problems, seed)
    return PromptSource(problems, seed, sampling)


def sample_seed(run_seed: int, iteration: int, prompt: int, sample: int, stream: str = "train") -> int:
    """The sampling seed of one response, in [0, 2**31): reproducible, unrelated to its neighbours'.

    `stream` separates uses that share the other numbers, such as training and evaluation.
    """
    # hashed, not added up: consecutive seeds give correlated draws in some samplers, and sums collide
    key = f"{stream}/{run_seed}/{iteration}/{prompt}/{sample}"
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest) & 0x7FFFFFFF
