"""Values as people and models write them between words, as LaTeX that math-verify reads."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

_ASCII = str.maketrans(
    {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
    | {ord(space): " " for space in "\u00a0\u2009\u202f"}
    | {ord(sign): latex for sign, latex in {
        "\u2212": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "∈": r"\in ", "∪": r"\cup ", "°": r"^\circ ",
        "²": "^2", "³": "^3", "½": r"\frac12 ",
        "±": r"\pm ", "≈": r"\approx ",
    }.items()}
)  # fmt: skip
_REWRITTEN = [
    # separators of thousands; (100,200) is a pair
    (r"(?<=\d)(?:\\[,;! ]|,\\!|\{,\})(?=\d{3}(?!\d))", ""),
    (r"(?<![\d,(\[{])(\d{1,3}),(\d{3})(?:,(\d{3}))?(?!,?\d)(?![^(\[{]*[)\]}])", r"\1\2\3"),
    (r"(?<![\d ])(\d{1,3}) (\d{3})(?: (\d{3}))?(?![\d ])", r"\1\2\3"),
    (r"^\\approx\s*|\^\{\\text\{(?:st|nd|rd|th)\}\}$", ""),
    (r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|log|ln|exp)\b", r"\\\1"),
    (r"(?<=\d)\s+i\b", "i"),
    (r"(?:(?<![\\A-Za-z])sqrt|√)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])pi\b", r"\\pi "),
    (r"\^(\d{2,})", r"^{\1}"),
    (r"\^\(([^()]*)\)", r"^{\1}"),
    (r"(?<![\d./])(\d+)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    (r"(?<!\\)\*", r"\\cdot "),
    (r"(?<!\\)%", r"\\%"),
    (r"\\?[$€£¥]\s*(?=[\d.])", ""),
    (r"^\\(?:text(?:bf|it|rm)?|mathbf|mathrm|mbox|bm|underline)\{([^{}]*)\}$", r"\1"),
    (r"^\{([^{}]*,[^{}]*)\}$", r"\\{\1\\}"),
]
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")
_UNIT = re.compile(r"(?<=[\d}\s)ie])\s*\\(?:text|mathrm|mbox|textrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?\s*$")
_LETTER_UNIT = re.compile(r"(?<=\d)\s+[mgshLN]$")
_MARKS = re.compile(r"^[\s*_:`\"]+|[\s*_`\"]+$")
_LEADING_WORDS = re.compile(
    r"^(?:(?:therefore|thus|hence|then|actually|indeed|simply|just|exactly|probably|now|equal to|given by|"
    r"either|also|=>?)[,\s]+)+",
    re.IGNORECASE,
)
_SEGMENT = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|\$(?P<inline>(?:\\\$|[^$\n])+)\$(?!\d)|\\\((?P<round>.+?)\\\)|\\\[(?P<square>.+?)\\\]",
    re.DOTALL,
)
_TOKEN = re.compile(
    r"""
      \\begin\{(\w+)\}.*?\\end\{\1\}
    | \\(?:text|mathrm|mbox|textbf|operatorname)\s*\{[^{}]*\}
    | \\[A-Za-z]+ | \\[{}$%,;!|\s\\]
    | \d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)(?:\.\d+)? | \d*\.\d+ | \d+
    | (?:sqrt|pi|sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan)(?![A-Za-z])
    | [A-Z]{2}(?![A-Za-z])
    | (?![aAI]\s[a-z]{2})[A-Za-z](?![A-Za-z'])
    | [-+*/^_=<>|!:()\[\]{}'%~&$€£¥√]
    | [,;](?=\s*[-+(\[{\\\d.$A-Za-z]) | \s+
    """,
    re.VERBOSE | re.DOTALL,
)
_CONNECTOR = re.compile(r"\s*(?:,\s*(?:and|or)\b|,|;|and\b|or\b)\s*")
_CHOICE = re.compile(r"\(([A-J])\)|([A-J])(?=\s*(?:$|[.:;)]|,(?!\s*[A-J]\b)|because\b|since\b))")
_NO_UNIT = re.compile(
    r"\s*(?:-(?!\s+[A-Za-z]{2})|[+*/=<>^|\\]"
    r"|(?:minus|plus|times|divided|over|mod|modulo|more|less|fewer|out|hundred|thousand|million|billion|dozen"
    r"|or|and|to|through|by)\b"
    r"|(?!(?:because|since|as|when|if|for|of|in)\b)[A-Za-z]+(?:\s+[A-Za-z]+)?,?\s+(?:(?:and|or)\s+)?\$?\d)"
)
"""After a value: what makes it a part of something larger."""
_BOUND = re.compile(
    r"\b(?:not|no|never|at least|at most|about|around|approximately|roughly|between|or|either|maybe|might|"
    r"could|possibl[ey]|less|more|fewer|greater|under|over|up to|so far)\b|n't\b",
    re.IGNORECASE,
)
_VALUE_BEGINS = re.compile(r"(?<![\w.])(?:[-+]?\s?\(?[$€£¥]?\.?\d)|\$|\\[(\[]")


def in_ascii(text: str) -> str:
    """Full-width characters and mathematical signs as ASCII and LaTeX."""
    return _REPEATING.sub(_as_fraction, text.translate(_ASCII))


def unmarked(text: str) -> str:
    """Without Markdown's marks, colons and quotes around it."""
    return _MARKS.sub("", text.strip())


def leading_value(text: str) -> str | None:
    """The value that a text begins with, or its values joined by commas; None if it begins with words.

    What follows may be a unit, a reason or nothing: `34 apples`, `12, because …`, but not `34 minus the …`.
    """
    value, rest = _leading(_LEADING_WORDS.sub("", unmarked(text), count=1))
    return None if value is None or _NO_UNIT.match(rest) else value


def lone_value(text: str) -> str | None:
    """The value that is all of a text, but for a unit of up to three words and a full stop."""
    value, rest = _leading(unmarked(text))
    return value if value is not None and re.fullmatch(r"(?:\s*[A-Za-z]+/?){0,3}\W*", rest) else None


def only_value(sentence: str) -> str | None:
    """The value of a sentence that has exactly one: `There are 34 of them`. None if it bounds it, or asks."""
    sentence = unmarked(sentence)
    if _BOUND.search(sentence) or sentence.endswith("?"):
        return None
    values = list(itertools.islice(_values(sentence), 2))
    return values[0] if len(values) == 1 else None


def latex(text: str) -> str:
    """One value in ASCII LaTeX: without currency, unit, and separators of thousands that LaTeX has."""
    text = in_ascii(unmarked(text).rstrip(". "))
    for pattern, replacement in _REWRITTEN:
        text = re.sub(pattern, replacement, text)
    return _LETTER_UNIT.sub("", _UNIT.sub("", text)).strip()


def _as_fraction(decimal: re.Match[str]) -> str:
    """1.2\\overline{34} = (1234 − 12) / 990"""
    whole, fixed, period = decimal.groups(default="")
    numerator = int(whole + fixed + period) - int(whole + fixed or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"


def _leading(text: str) -> tuple[str | None, str]:
    """The value or values at the beginning, and what follows them."""
    if choice := _CHOICE.match(text):
        return choice[1] or choice[2], text[choice.end() :]
    values: list[str] = []
    rest = text
    while True:
        value, after = _one(rest)
        if value is None:
            break
        values.append(value)
        rest = after
        connector = _CONNECTOR.match(rest)
        if connector is None or _one(rest[connector.end() :])[0] is None:
            break
        rest = rest[connector.end() :]
    if not values:
        return None, rest
    if percent := re.match(r"\s*(?:%|percent\b)", rest):
        values[-1], rest = values[-1] + r"\%", rest[percent.end() :]
    return ", ".join(values), rest


def _one(text: str) -> tuple[str | None, str]:
    """The first value of a text, and the rest: in dollars or \\(…\\), or bare."""
    segment = _SEGMENT.match(text)
    if segment and not re.search(
        r"\s$|[A-Za-z]{3,}\s", re.sub(r"\\[A-Za-z]+(?:\{[^{}]*\})?", "", _inner(segment))
    ):
        return latex(_inner(segment)) or None, text[segment.end() :]
    end = 0
    while token := _TOKEN.match(text, end):
        end = token.end()
    bare = text[:end].rstrip(" ,;:.([{=-$")
    return (latex(bare), text[len(bare) :]) if re.search(r"[\w\\]", bare) else (None, text)


def _inner(segment: re.Match[str]) -> str:
    return next(part for part in segment.groupdict().values() if part is not None)


def _values(sentence: str) -> Iterator[str]:
    place = 0
    while begin := _VALUE_BEGINS.search(sentence, place):
        value, rest = _one(sentence[begin.start() :])
        if value:
            yield value
        place = max(len(sentence) - len(rest), begin.end())
