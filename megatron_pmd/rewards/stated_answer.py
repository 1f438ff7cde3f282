"""Which part of a response states its answer, and which values it states there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

from megatron_pmd.rewards.plain_mathematics import (
    in_ascii,
    latex,
    leading_value,
    lone_value,
    only_value,
    unmarked,
)

_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;.]|\\[()\[\]])*(?:(?:or|and)\b)?(?:[\s$]|\\[(\[])*(?:[A-Za-z]\w?\s*=\s*)?", re.IGNORECASE
)
"""What stands between boxes that are one statement: a list, or guesses."""
_ANSWER = r"\b(?:answer|final\s+result)"
_SENTENCE_MARK = re.compile(
    rf"{_ANSWER}\W{{0,4}}:|{_ANSWER}(?:\s+to\s+[\w\s]{{1,40}}?)?\s+(?:is|would\s+be|must\s+be)\b"
    r"|\bsolution\s+is\b|答案\s*[是为:]",
    re.IGNORECASE,
)
_LINE_MARK = re.compile(
    r"<answer>|^\#{4}(?:\s|(?=[-$\d]))|^[ \t#*_]*(?:final[ \t]+)?answer[ \t*_:]*$",
    re.IGNORECASE | re.MULTILINE,
)
"""Followed by the value and nothing else: `#### 4. Conclusion` is a heading."""
_DISPLAY = re.compile(r"(?:\$\$([^$]+)\$\$|\\\[((?:(?!\\\[).)+)\\\])\s*\.?$", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|[。\n]")
_CONCLUDES = re.compile(
    r"\W*(?:so|therefore|thus|hence|consequently|finally|altogether|in total|in conclusion)\b", re.IGNORECASE
)
_COPULA = re.compile(r"\b(?:is|are|has|have|equals|makes)\b|=")
_PARTIAL = re.compile(
    r"\b(?:cases?|steps?|options?|parts?|first|second|third|other|another|so far|now|next|need|"
    r"try|cannot|must)\b",
    re.IGNORECASE,
)
"""A conclusion with such a word may be one of many."""
_RESULT = re.compile(r"(?:the\s+)?(?:final\s+)?(?:result|solution|total|sum|value)\s*[:=]", re.IGNORECASE)
_NUMBER = re.compile(r"[\s*$-]*[\d.,/]+[\s*$.]*")
_END_TOKEN = re.compile(r"(?:<\|\w+\|>|</s>)\s*$")
_ARTICLE = re.compile(r"^(?:an?|the|on|in|at)\s+", re.IGNORECASE)
_JUDGED = re.compile(r"\s*(?:correct|wrong|right|incorrect)\W*")
"""`The answer is correct` states none."""

THOUGHT = "<think>"
"""Begins one."""
LONGEST_STATEMENT = 1000
"""Characters behind a mark that are read; the longest answer of MATH-500 has 159."""
Reading = Callable[[], str | None]


def stated_answer(response: str, *, truncated: bool, text: bool) -> str | None:
    """The answer as LaTeX without marks around it, its values joined by commas; None if none is stated.

    The last statement counts: a box, `Answer:`, `the answer is`, `####` or <answer>. A response without one
    states the value that is alone on its last line, or that its last sentence concludes with. One that was
    cut does not: there the last line is the middle of something.

    text    the reference answer is words, not mathematics
    """
    response = in_ascii(_END_TOKEN.sub("", after_thinking(response)))
    statements = sorted(
        _statements(response, truncated=truncated, text=text), key=lambda found: found[0], reverse=True
    )
    for _, read in statements:
        if value := read():
            return value
    return None if truncated else _last_line(response, text=text)


def after_thinking(response: str) -> str:
    """A thought that was never closed has no answer behind it."""
    _, closed, after = response.rpartition("</think>")
    return after if closed else response.partition(THOUGHT)[0]


def _statements(response: str, *, truncated: bool, text: bool) -> Iterator[tuple[int, Reading]]:
    """(where, how to read it) of whatever says that it is the answer."""
    if boxes := _boxes(response):
        yield boxes[-1][0], lambda: words(boxes[-1][2]) if text else _last_boxes(response, boxes)
    ended = response
    if truncated:
        # `Answer: 3` may be the beginning of 34: only what came to its end is stated
        ends = [end.start() for end in _SENTENCE_END.finditer(response)]
        ended = response[: ends[-1] if ends else 0]
    for mark in _SENTENCE_MARK.finditer(ended):
        yield mark.start(), partial(_of_sentence, _line(ended, mark.end()), text=text)
    for mark in _LINE_MARK.finditer(ended):
        yield mark.start(), partial(_of_line, _line(ended, mark.end()), text=text)


def _line(response: str, start: int) -> str:
    """What stands behind a mark on its line; if nothing does, the next line that has any."""
    return response[start : start + LONGEST_STATEMENT].partition("</answer>")[0].strip().partition("\n")[0]


def _of_sentence(line: str, *, text: bool) -> str | None:
    sentence = _SENTENCE_END.split(line)[0]
    if _JUDGED.fullmatch(sentence):
        return None
    return words(sentence) if text else leading_value(sentence) or _copula(sentence)


def _of_line(line: str, *, text: bool) -> str | None:
    return words(line) if text else lone_value(line) or _copula(line)


def _copula(sentence: str) -> str | None:
    return only_value(sentence) if _COPULA.search(sentence) else None


def words(statement: str) -> str | None:
    """The statement as \\text: without marks, article and reason."""
    bare = re.sub(r"\\(?:text\w*|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|[$*_]|\\[()\[\]]", r"\1", statement)
    bare = _ARTICLE.sub("", re.split(r"[.,;:]|\b(?:because|since)\b", unmarked(bare))[0]).strip(" ()")
    return rf"\text{{{bare}}}" if bare else None


def _boxes(response: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each box that is closed and in no other."""
    found: list[tuple[int, int, str]] = []
    open_braces: list[re.Match[str]] = []
    for brace in _BRACE.finditer(response):
        if brace["box"] or brace[0] == "{":
            open_braces.append(brace)
        elif brace[0] == "}" and open_braces and (box := open_braces.pop())["box"]:
            while found and found[-1][0] > box.start():
                found.pop()
            found.append((box.start(), brace.end(), response[box.end() : brace.start()]))
    return found


def _last_boxes(response: str, boxes: list[tuple[int, int, str]]) -> str | None:
    """The last box, with those that are one statement with it."""
    run = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if not _BETWEEN_BOXES.fullmatch(response[box[1] : run[0][0]]):
            break
        run.insert(0, box)
    values = [leading_value(content) or latex(content) for _, _, content in run]
    return ", ".join(value for value in values if value) or None


def _last_line(response: str, *, text: bool) -> str | None:
    lines = [line for line in response.splitlines() if unmarked(line)]
    if not lines:
        return None
    if text:
        return words(lines[-1])
    if all(_NUMBER.fullmatch(line) for line in lines[-2:]) and len(lines) > 1:
        return None  # a column of guesses
    display = _DISPLAY.search(response.rstrip())
    sentences = [sentence for sentence in _SENTENCE_END.split(response.strip()) if sentence.strip()]
    value = lone_value(display[1] or display[2] if display else _RESULT.sub("", unmarked(lines[-1]), count=1))
    return value or _conclusion(sentences[-1].rstrip())


def _conclusion(sentence: str) -> str | None:
    whole = sentence.endswith((".", "!", "$")) and _CONCLUDES.match(sentence)
    return _copula(sentence) if whole and not _PARTIAL.search(sentence) else None
