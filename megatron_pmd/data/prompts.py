"""Which prompt comes next: rendering to tokens, the order over epochs, and the seed of each sample."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import TYPE_CHECKING, Any

from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import DataError

if TYPE_CHECKING:
    import numpy as np


def tokenize(problems: list[Problem], tokenizer: Any, max_prompt_tokens: int) -> tuple[list[Problem], int]:
    """Render each problem's chat, ready for generation, and drop the ones longer than max_prompt_tokens.

    Returns the kept problems with their tokens, and how many were dropped. Raises DataError if none is left,
    if the tokenizer (a Hugging Face one) has no chat template, or if that refuses a problem's messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or "this model"
        raise DataError(
            f"the tokenizer of {name} has no chat template; put a chat_template.jinja into its folder "
            "(a base model can take its instruct model's), or set chat_template in tokenizer_config.json"
        )
    kept, lengths = [], []
    for problem in problems:
        try:
            # transformers 5 returns a dictionary with an attention mask unless told otherwise
            tokens = tokenizer.apply_chat_template(
                list(problem.messages), add_generation_prompt=True, tokenize=True, return_dict=False
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
            f"all {len(problems)} prompts are longer than batch.max_prompt_tokens={max_prompt_tokens}; "
            f"the shortest has {min(lengths)} tokens, the longest {max(lengths)}: raise it"
            if problems
            else "no problems to tokenise"
        )
    return kept, len(problems) - len(kept)


class PromptSource:
    """An endless, reproducible sequence of problems; each epoch is shuffled anew, from (seed, epoch)."""

    def __init__(self, problems: list[Problem], seed: int, shuffle: bool = True) -> None:
        """Start at epoch 0; shuffle=False keeps the order given in every epoch. DataError if it is empty."""
        if not problems:
            raise DataError("a prompt source needs at least one problem")
        self._problems = list(problems)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._cursor = 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """Problems in one epoch."""
        return len(self._problems)

    @property
    def epoch(self) -> int:
        """Complete passes over the problems so far."""
        return self._epoch

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

    def peek(self, n: int) -> list[Problem]:
        """The next n problems, which take() will give again."""
        state = self.state()
        try:
            return self.take(n)
        finally:
            self.load_state(state)

    def state(self) -> dict[str, Any]:
        """Where the sequence stands, in JSON values: epoch, cursor (problems taken of it), of which data."""
        return {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "problems": len(self._problems),
            "fingerprint": self._fingerprint,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. DataError if it is of other problems, seed or shuffle."""
        here = self.state()
        if missing := [key for key in here if key not in state]:
            raise DataError(f"the saved prompt order lacks {', '.join(missing)}; it is not of this program")
        for key in ("problems", "seed", "shuffle", "fingerprint"):
            if state[key] != here[key]:
                raise DataError(
                    f"the saved prompt order has {key}={state[key]}, this run {here[key]}: the "
                    "data, the tokenizer, data.shuffle or the seed changed; restore them, or start a run "
                    "under another name"
                )
        epoch, cursor = state["epoch"], state["cursor"]
        if not (
            type(epoch) is int and epoch >= 0 and type(cursor) is int and 0 <= cursor < len(self._problems)
        ):
            raise DataError(
                f"the saved prompt order is at epoch {epoch!r}, problem {cursor!r} of {len(self._problems)}"
            )
        self._epoch, self._cursor = epoch, cursor
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        import numpy as np

        if not self._shuffle:
            return np.arange(len(self._problems))
        return np.random.default_rng(np.random.SeedSequence([self._seed, epoch])).permutation(
            len(self._problems)
        )

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for p in self._problems:
            digest.update(json.dumps([p.index, p.messages, p.answer, p.tokens]).encode())
        return digest.hexdigest()


def sample_seed(run_seed: int, iteration: int, prompt: int, sample: int, stream: str = "train") -> int:
    """The sampling seed of one response, in [0, 2**31): reproducible, unrelated to its neighbours'.

    `stream` separates uses that share the other numbers, such as training and evaluation.
    """
    # hashed, not added up: consecutive seeds give correlated draws in some samplers, and sums collide
    key = f"{stream}/{run_seed}/{iteration}/{prompt}/{sample}"
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest) & 0x7FFFFFFF
