"""What an engine answers to one request, from the bytes of its HTTP response to arrays."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
import pybase64

from megatron_pmd.errors import EngineError


class _TokenLogProb(msgspec.Struct, array_like=True, gc=False):
    """SGLang's [log-probability, token, text], of which the first is read."""

    log_prob: float


class _PromptLogProb(msgspec.Struct, array_like=True, gc=False):
    """The same of a token of the prompt; None for the first that is asked for, which SGLang leaves out."""

    log_prob: float | None


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Information(msgspec.Struct):
    finish_reason: dict[str, Any]
    weight_version: str | None
    weight_versions: list[_Span] | None = None
    output_token_logprobs: list[_TokenLogProb] | None = None
    input_token_logprobs: list[_PromptLogProb] | None = None
    routed_experts: msgspec.Raw = msgspec.Raw(b"null")


class _Response(msgspec.Struct):
    output_ids: msgspec.Raw
    meta_info: _Information


# Typed decoding makes one number a token where orjson makes a list of three: a third of the time.
_DECODER = msgspec.json.Decoder(_Response)
_LOG_PROB = attrgetter("log_prob")


@dataclass(frozen=True, eq=False)
class EngineAnswer:
    """One answer of `/generate`.

    tokens          int32 [sampled]
    log_probs       fp32 [sampled]
    spans           (tokens, version of the weights that sampled them), in order; the version is None, or no
                    number, while the engine holds a mixture
    finish_reason   SGLang's, with its `type`: `stop`, `length` or `abort`
    routed_experts  as it came: which experts the tokens so far went to, but the last; None: not asked for
    prompt_log_probs  fp32 [of the prompt, as asked for]; NaN for the first of them, which has none
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    spans: list[tuple[int, str | None]]
    finish_reason: dict[str, Any]
    routed_experts: bytes | None
    prompt_log_probs: np.ndarray


def parse_answer(body: bytes) -> EngineAnswer:
    """The answer in a response's body. Raises ValueError if there is none in it."""
    response = _DECODER.decode(body)
    information = response.meta_info
    entries, tokens = information.output_token_logprobs or (), _integers(response.output_ids)
    of_prompt = [entry.log_prob for entry in information.input_token_logprobs or ()]
    return EngineAnswer(
        tokens=tokens,
        log_probs=np.fromiter(map(_LOG_PROB, entries), np.float32, len(entries)),
        spans=_spans(information, len(tokens)),
        finish_reason=information.finish_reason,
        routed_experts=_base64(information.routed_experts),
        prompt_log_probs=np.array(of_prompt, np.float32),
    )


def _spans(information: _Information, tokens: int) -> list[tuple[int, str | None]]:
    """SGLang lists the versions of a finished response; one that is aborted has the latest alone."""
    listed = information.weight_versions
    if not listed:
        return [(tokens, information.weight_version)]
    return [(span.end - span.start, span.version) for span in listed]


def _integers(value: msgspec.Raw) -> np.ndarray:
    """A JSON array of integers as int32; up to the first that is none, so that the caller misses the rest."""
    text = bytes(value)[1:-1]
    return np.fromstring(text, np.int32, sep=",") if text.strip() else np.empty(0, np.int32)


def _base64(value: msgspec.Raw) -> bytes | None:
    """What a JSON string holds in base64; None for null."""
    text = memoryview(value)
    if text == b"null":
        return None
    # No string is made of it: 4 MB for 8,192 tokens. `validate` is the fast way of pybase64.
    return pybase64.b64decode(text[1:-1], validate=True)


def recorded_experts(data: bytes, tokens: int, width: int) -> np.ndarray:
    """SGLang's [tokens so far − 1, layers, top-k] as uint8 or uint16 [tokens − 1, width].

    tokens: prompt and response so far. width: layers · top-k of the model.
    SGLang has int32 (state_capturer/base.py); an engine with this program's plugin has the smallest type that
    holds the numbers. EngineError if they are not so many, or not the numbers of experts.
    """
    numbers = (tokens - 1) * width
    itemsize = len(data) // numbers if numbers > 0 else 0
    if itemsize not in (1, 2, 4) or itemsize * numbers != len(data):
        raise EngineError(
            f"an engine recorded {len(data):,} bytes of experts for {tokens - 1:,} tokens, which is not the "
            f"{width} experts that the model chooses a token; do actor and engine have the same model?"
        )
    experts = np.frombuffer(data, f"i{itemsize}" if itemsize > 1 else np.uint8).reshape(tokens - 1, width)
    if itemsize == 4:
        if experts.min() < 0 or experts.max() > np.iinfo(np.uint16).max:
            raise EngineError(
                f"an engine recorded experts from {experts.min()} to {experts.max()}, which no model has"
            )
        return experts.astype(np.uint8 if experts.max() <= np.iinfo(np.uint8).max else np.uint16)
    return experts.view(np.uint8 if itemsize == 1 else np.uint16)
