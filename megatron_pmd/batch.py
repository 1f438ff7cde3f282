"""What a rollout is: samples, and the packed arrays that travel to the actor ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_pmd.errors import DataError, StaleWeights

CUT = ("length", "repetition")
"""Finish reasons of responses that did not end by themselves."""
NOT_SAMPLED = -1
"""In place of a weight version: the token is the prompt's, or was inserted (tool output)."""
OF_NO_POLICY = -2
"""In place of one: weights sampled the token over a cache of earlier ones, as no policy does."""


@dataclass(frozen=True)
class Segment:
    """Consecutive response tokens of one origin."""

    tokens: int
    """How many."""
    weight_version: int
    """The weights that sampled them; NOT_SAMPLED for inserted ones."""
    counted: bool = True
    """Whether they count in the loss: not those that were inserted, nor what a setting excludes."""
    stale_cache: bool = False
    """Whether the KV cache of what stands before them may be of earlier weights (rollout.pause=in_place)."""

    @property
    def policy(self) -> int:
        """The weights whose policy sampled them; NOT_SAMPLED or OF_NO_POLICY where none did."""
        return OF_NO_POLICY if self.stale_cache else self.weight_version


@dataclass(eq=False)
class Sample:
    """One response to one prompt. Its tokens are arrays: a rollout has tens of millions of them."""

    group: int
    """Which prompt of this rollout, from 0; samples of one prompt share it."""
    number: int
    """Which response of its group, from 0."""
    problem: int
    """The problem's index in its data source."""
    prompt: str
    """The rendered prompt text, for people."""
    response: str
    """The decoded response, without special tokens; this is what is graded."""
    answer: str
    prompt_tokens: np.ndarray
    """int32 [prompt]; the samples of a group may share one array."""
    response_tokens: np.ndarray
    """int32 [response]"""
    engine_log_probs: np.ndarray
    """fp32 [response]: log π_b of each response token at the sampling temperature; 0 for inserted ones."""
    finish_reason: str
    """`stop`, `length` or `repetition`."""
    weight_version: int
    """The weights that sampled its last token."""
    seed: int
    branch: int = 0
    """Which trajectory of its response: an agent's may have several, which share its reward."""
    source: str = ""
    """Name of the problem's source where a run has several."""
    reward: float = 0.0
    shaped_reward: float = 0.0
    """The reward with what length and truncation add or take; the advantage is measured in it."""
    advantage: float = 0.0
    tau: float = 0.0
    """Regularisation strength τ of its group's subproblem, in reward units; set with the advantage."""
    reward_error: str | None = None
    """Why the reward is 0 although the grader gave no verdict."""
    segments: list[Segment] = field(default_factory=list)
    """The response in order; if none are given, one: sampled under weight_version, all of it counted."""
    routed_experts: np.ndarray | None = None
    """Which experts each token but the last went to: [prompt + response − 1, layers · top-k], of the smallest
    unsigned type."""
    teacher_log_probs: np.ndarray | None = None
    """fp32 [response]: log π_T of each response token, inserted ones included; None: no teacher was asked."""

    def __post_init__(self) -> None:
        self.prompt_tokens = np.asarray(self.prompt_tokens, np.int32)
        self.response_tokens = np.asarray(self.response_tokens, np.int32)
        self.engine_log_probs = np.asarray(self.engine_log_probs, np.float32)
        if not self.segments:
            self.segments = [Segment(len(self.response_tokens), self.weight_version)]

    @property
    def tokens(self) -> np.ndarray:
        """int32 [prompt + response]"""
        return np.concatenate([self.prompt_tokens, self.response_tokens])


def by_response(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each response, which stand one behind the other with branch 0 first."""
    responses: list[list[Sample]] = []
    for sample in samples:
        if sample.branch == 0:
            responses.append([])
        responses[-1].append(sample)
    return responses


def first_branches(samples: Sequence[Sample]) -> list[Sample]:
    """One sample of each response: what is counted by responses, as a mean reward, is over these."""
    return [sample for sample in samples if sample.branch == 0]


@dataclass(frozen=True)
class SampleColumns:
    """What every rank knows of every sample.

    lengths          int64   [samples]  prompt plus response tokens
    prompt_lengths   int64   [samples]
    counted_lengths  int64   [samples]  tokens that count in the loss
    groups           int64   [samples]
    responses        int64   [samples]  the same for all samples of a response: see by_response
    rewards, advantages, taus  float64 [samples]  rewards are the shaped ones
    """

    lengths: np.ndarray
    prompt_lengths: np.ndarray
    counted_lengths: np.ndarray
    groups: np.ndarray
    responses: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    taus: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def response_lengths(self) -> np.ndarray:
        return self.lengths - self.prompt_lengths


@dataclass(frozen=True)
class TokenColumns:
    """The tokens of the samples that are here: sample i owns ids[offsets[i] : offsets[i + 1]], prompt first.

    A sample that is not here owns none.
    offsets          int64   [samples + 1]
    ids              int32   [tokens here]
    engine_log_probs float32 [tokens here]  0 at prompt tokens
    policies         int32   [tokens here]  the weights whose policy sampled it; NOT_SAMPLED: prompt, or
                     inserted. OF_NO_POLICY: see Segment.policy
    counted          bool    [tokens here]  whether it counts in the loss; False at prompt tokens
    routed_experts   uint8 or uint16 [tokens here, layers · top-k]  None: not recorded for all samples. A
                     sample's last token, which goes nowhere in the engine, has its predecessor's
    teacher_log_probs float32 [tokens here]  None: not all responses have any. 0 at prompt tokens, and in
                     supervised examples
    """

    offsets: np.ndarray
    ids: np.ndarray
    engine_log_probs: np.ndarray
    policies: np.ndarray
    counted: np.ndarray
    routed_experts: np.ndarray | None
    teacher_log_probs: np.ndarray | None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class RolloutBatch:
    """What a rank knows of a rollout: some numbers of every sample, and the tokens of those that are here.

    weight_version   the engines' weights when the rollout was taken: those of the actor's log π_t
    sampled_versions the weights that sampled any token, ascending
    temperature      of the policy that the responses' log-probabilities are of; those of examples are at 1
    examples         the last so many samples are supervised examples, not sampled responses
    padding_experts  [layers · top-k]  the experts of the rollout's first token, which padding goes to as
                     well. None: as routed_experts
    scored           whether there are teacher_log_probs
    """

    samples: SampleColumns
    tokens: TokenColumns
    weight_version: int
    sampled_versions: list[int]
    temperature: float
    examples: int
    padding_experts: np.ndarray | None
    scored: bool

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def sampled(self) -> int:
        """Responses of the policy: samples before the supervised examples."""
        return len(self) - self.examples

    @property
    def here(self) -> np.ndarray:
        """The samples whose tokens are here, ascending."""
        return np.flatnonzero(np.diff(self.tokens.offsets))

    @classmethod
    def describe(
        cls,
        samples: Sequence[Sample],
        temperature: float,
        *,
        examples: int = 0,
        weight_version: int | None = None,
    ) -> RolloutBatch:
        """What is known of every sample; the tokens of none are here.

        weight_version: see there; None: the newest that any sample has.
        """
        lengths = [len(s.prompt_tokens) + len(s.response_tokens) for s in samples]
        segments = [segment for s in samples for segment in s.segments if segment.tokens]
        padding_experts = _padding_experts(samples, lengths)
        sampled = samples[: len(samples) - examples]
        scored = bool(sampled) and all(s.teacher_log_probs is not None for s in sampled)
        columns = SampleColumns(
            lengths=np.array(lengths, np.int64),
            prompt_lengths=np.array([len(s.prompt_tokens) for s in samples], np.int64),
            counted_lengths=np.array(
                [sum(segment.tokens for segment in s.segments if segment.counted) for s in samples], np.int64
            ),
            groups=np.array([s.group for s in samples], np.int64),
            responses=np.cumsum([s.branch == 0 for s in samples], dtype=np.int64),
            rewards=np.array([s.shaped_reward for s in samples], np.float64),
            advantages=np.array([s.advantage for s in samples], np.float64),
            taus=np.array([s.tau for s in samples], np.float64),
        )
        return cls(
            samples=columns,
            tokens=_token_columns(
                np.zeros(len(samples) + 1, np.int64), np.empty(0, np.uint8), padding_experts, scored
            ),
            weight_version=(
                max(s.weight_version for s in samples) if weight_version is None else weight_version
            ),
            sampled_versions=sorted({segment.weight_version for segment in segments} - {NOT_SAMPLED}),
            temperature=temperature,
            examples=examples,
            padding_experts=padding_experts,
            scored=scored,
        )

    @classmethod
    def pack(
        cls,
        samples: Sequence[Sample],
        temperature: float,
        *,
        examples: Sequence[Sample] = (),
        weight_version: int | None = None,
    ) -> RolloutBatch:
        """Sampled responses, then supervised examples, all of their tokens. weight_version: see describe."""
        everything = [*samples, *examples]
        known = cls.describe(everything, temperature, examples=len(examples), weight_version=weight_version)
        numbers = np.arange(len(everything))
        batch = known.share(numbers, np.empty(known.share_bytes(numbers), np.uint8))
        batch.fill(everything)
        return batch

    def share_bytes(self, samples: np.ndarray) -> int:
        """What the tokens of these samples take in memory."""
        tokens = int(self.samples.lengths[samples].sum())
        columns = _columns(self.padding_experts, self.scored)
        return tokens * sum(width * dtype.itemsize for _, dtype, width in columns)

    def share(self, samples: np.ndarray, memory: np.ndarray) -> RolloutBatch:
        """The batch with the tokens of these samples alone, which are in `memory`, or are to be: see fill.

        memory: uint8 [share_bytes(samples) or more]; not copied.
        """
        held = np.zeros(len(self), bool)
        held[samples] = True
        lengths = np.where(held, self.samples.lengths, 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = _token_columns(offsets, memory, self.padding_experts, self.scored)
        return dataclasses.replace(self, tokens=tokens)

    def fill(self, samples: Sequence[Sample]) -> None:
        """Write the tokens of the samples that are here. samples: all of those described, in their order."""
        columns = self.tokens
        for number in self.here.tolist():
            sample = samples[number]
            start, end = columns.offsets[number : number + 2].tolist()
            response = start + len(sample.prompt_tokens)
            columns.ids[start:response] = sample.prompt_tokens
            columns.ids[response:end] = sample.response_tokens
            columns.engine_log_probs[start:response] = 0.0
            columns.engine_log_probs[response:end] = sample.engine_log_probs
            if columns.teacher_log_probs is not None:
                given = sample.teacher_log_probs
                columns.teacher_log_probs[start:response] = 0.0
                columns.teacher_log_probs[response:end] = 0.0 if given is None else given
            columns.policies[start:response] = NOT_SAMPLED
            columns.counted[start:response] = False
            for segment in sample.segments:
                columns.policies[response : response + segment.tokens] = segment.policy
                columns.counted[response : response + segment.tokens] = segment.counted
                response += segment.tokens
            assert response == end, "a sample's segments cover its response"
            if columns.routed_experts is not None:
                columns.routed_experts[start : end - 1] = sample.routed_experts
                columns.routed_experts[end - 1] = columns.routed_experts[end - 2]

    def check_routing(self, width: int) -> None:
        """DataError unless each token has `width` recorded experts: layers · top-k."""
        found = 0 if self.padding_experts is None else len(self.padding_experts)
        if found != width:
            raise DataError(
                f"actor.experts.replay_routing: the rollout has {found} recorded experts a token, "
                f"this model chooses {width}; was it drawn with the setting on, by the same model?"
            )
        experts = self.tokens.routed_experts
        # an engine's memory of them begins as zeros
        if experts is not None and experts.size and not experts.any():
            raise DataError(
                "actor.experts.replay_routing: the engines recorded nothing: every token went to expert 0 "
                "alone, in every layer. SGLang records none where a kernel chooses the experts, as with "
                "moe_runner_backend=triton_kernel or flashinfer_trtllm, which some GPUs have by default; "
                'set rollout.sglang={"moe_runner_backend": "triton"}'
            )

    def refuse_undeclared_versions(self, max_staleness: int) -> None:
        """StaleWeights unless every sampled token is of the batch's weights or of at most so many before."""
        oldest = self.weight_version - max_staleness
        found = [v for v in self.sampled_versions if not oldest <= v <= self.weight_version]
        if found:
            raise StaleWeights(
                f"the rollout of weight version {self.weight_version} has tokens sampled under {found}; "
                + (
                    f"rollout.partial.max_staleness or rollout.staleness={max_staleness} declares {oldest} "
                    "the oldest"
                    if max_staleness
                    else "without rollout.partial or rollout.staleness all of it must be of one version"
                )
            )


def _columns(padding_experts: np.ndarray | None, scored: bool) -> list[tuple[str, np.dtype, int]]:
    """Name, type and width of what a batch has of each token; those of larger types first, to be aligned."""
    columns = [("ids", np.dtype(np.int32), 1), ("engine_log_probs", np.dtype(np.float32), 1)]
    columns.append(("policies", np.dtype(np.int32), 1))
    if scored:
        columns.append(("teacher_log_probs", np.dtype(np.float32), 1))
    if padding_experts is not None:
        columns.append(("routed_experts", padding_experts.dtype, len(padding_experts)))
    return [*columns, ("counted", np.dtype(np.bool_), 1)]


def _token_columns(
    offsets: np.ndarray, memory: np.ndarray, padding_experts: np.ndarray | None, scored: bool
) -> TokenColumns:
    """A batch's arrays of its tokens in this memory, one behind the other."""
    tokens = int(offsets[-1])
    arrays: dict[str, Any] = {"routed_experts": None, "teacher_log_probs": None}
    start = 0
    for name, dtype, width in _columns(padding_experts, scored):
        end = start + tokens * width * dtype.itemsize
        arrays[name], start = memory[start:end].view(dtype), end
    if padding_experts is not None:
        arrays["routed_experts"] = arrays["routed_experts"].reshape(tokens, len(padding_experts))
    return TokenColumns(offsets, **arrays)


def _padding_experts(samples: Sequence[Sample], lengths: list[int]) -> np.ndarray | None:
    """The first token's experts, in the smallest type that holds all tokens'; None if any sample has none."""
    widths, largest = set(), 0
    for sample, length in zip(samples, lengths, strict=True):
        recorded = sample.routed_experts
        if recorded is None or not recorded.size or len(recorded) != length - 1:
            return None
        widths.add(recorded.shape[1])
        # a pass over all numbers, of which there are billions, only where the type does not answer
        if recorded.dtype != np.uint8 and largest <= np.iinfo(np.uint8).max:
            largest = max(largest, int(recorded.max()))
    first = samples[0].routed_experts if samples else None
    if first is None or len(widths) != 1:
        return None
    return first[0].astype(np.min_scalar_type(largest))
