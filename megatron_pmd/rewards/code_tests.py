"""A problem's tests in the forms of published sets, and what a program must answer to each."""

from __future__ import annotations

import ast
import json
import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_pmd.data.problems import Problem
from megatron_pmd.data.rows import kind_of, value_at
from megatron_pmd.rewards.sandboxed import ASSERTS, CALL, STDIN

TOLERANCE = 1e-6
"""Relative, absolute below 1: of a number with a decimal point on standard output."""
SPARE_BYTES = 1 << 16
"""What a program may write beyond the size of the right answer."""
FUNCTION_KINDS = ("functional", "function_call")
"""LiveCodeBench's and PRIME's words for a case that calls a function."""


@dataclass(frozen=True)
class Case:
    """One run of a program."""

    request: dict[str, Any]
    """Its mode, and what the program is given; never what it must answer."""
    output_bytes: int
    passes: Callable[[bytes], bool]


def tests_of(problem: Problem, key: str | None) -> list[Case]:
    """The cases of a problem: of its answer, or of a column of its row; one or more.

    The forms are those of docs/code.md. DataError where the row has no such column, ValueError for tests that
    are of none of the forms.
    """
    given: Any = problem.answer
    if key is not None:
        given = value_at(problem.metadata, key, f"problem {problem.index}", "reward.tests_key")
    if isinstance(given, str):
        given = _read(given, problem.index)
    cases = list(_cases(given, problem))
    if not cases:
        raise ValueError(f"problem {problem.index} has no tests")
    return cases


def _read(text: str, index: int) -> Any:
    """JSON; or else Python, which stays text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        ast.parse(text)
    except (ValueError, SyntaxError, MemoryError) as error:
        raise ValueError(f"the tests of problem {index} are neither JSON nor Python: {error}") from None
    return text


def _cases(given: Any, problem: Problem) -> Iterator[Case]:
    match given:
        case str() if given.strip():
            yield _asserts(given, problem.metadata)
        case [str(), *_] if all(isinstance(part, str) for part in given):
            yield _asserts("\n".join(given), problem.metadata)
        case {"inputs": list(inputs), "outputs": list(outputs)} if len(inputs) == len(outputs):
            for put_in, out in zip(inputs, outputs, strict=True):
                yield _case(given.get("fn_name"), put_in, out)
        case list() if all(isinstance(part, dict) and {"input", "output"} <= part.keys() for part in given):
            for part in given:
                yield _case(_function(part, problem), part["input"], part["output"])
        case _:
            raise ValueError(
                f"the tests of problem {problem.index} have the form of a {kind_of(given)} that is none of "
                'docs/code.md: {"inputs": […], "outputs": […]}, [{"input": …, "output": …}], or asserts'
            )


def _function(case: dict[str, Any], problem: Problem) -> str | None:
    """Which function a case calls; None: it runs the program."""
    kind = case.get("testtype") or case.get("type")
    if kind not in FUNCTION_KINDS:
        return None
    for place in (case, case.get("metadata"), problem.metadata, problem.metadata.get("metadata")):
        if isinstance(place, str):  # LiveCodeBench keeps it as JSON
            place = _read(place, problem.index)
        if isinstance(place, dict) and (name := place.get("fn_name") or place.get("func_name")):
            return str(name)
    raise ValueError(f"a case of problem {problem.index} calls a function, but none is named in fn_name")


def _case(function: str | None, put_in: Any, out: Any) -> Case:
    if function is None:
        expected = _text(out)
        return Case(
            {"mode": STDIN, "input": _text(put_in)},
            len(expected.encode(errors="replace")) + SPARE_BYTES,
            lambda written: same_output(written.decode(errors="replace"), expected),
        )
    if isinstance(put_in, str):  # one argument a line, in JSON
        put_in = [json.loads(line) for line in put_in.splitlines() if line.strip()]
    if isinstance(out, str):
        out = _json_or_text(out)
    return Case(
        {"mode": CALL, "function": function, "arguments": put_in},
        len(json.dumps(out)) + SPARE_BYTES,
        lambda returned: _same_value(returned, out),
    )


def _text(lines: Any) -> str:
    """APPS has some inputs and outputs as a list of lines."""
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _asserts(tests: str, row: dict[str, Any]) -> Case:
    """MBPP's setup comes before the tests; HumanEval's tests are a function that is given the program's."""
    before, name = row.get("test_setup_code"), row.get("entry_point")
    if isinstance(before, str) and before:
        tests = f"{before}\n{tests}"
    if isinstance(name, str) and "def check(" in tests:
        tests = f"{tests}\n\ncheck({name})\n"
    token = secrets.token_hex(16)
    request = {"mode": ASSERTS, "tests": tests, "token": token}
    return Case(request, SPARE_BYTES, lambda written: written == token.encode())


def same_output(written: str, expected: str) -> bool:
    """Whether the words are the same, however they are spaced; decimals to a millionth."""
    mine, theirs = written.split(), expected.split()
    return len(mine) == len(theirs) and all(map(_same_word, mine, theirs))


def _same_word(mine: str, theirs: str) -> bool:
    if mine == theirs:
        return True
    if "." not in theirs:
        return False
    try:
        difference, size = abs(float(mine) - float(theirs)), abs(float(theirs))
    except ValueError:
        return False
    return math.isfinite(difference) and difference <= TOLERANCE * max(1.0, size)


def _same_value(returned: bytes, expected: Any) -> bool:
    """As JSON; APPS and TACO put some of the values into a list of one."""
    try:
        value = json.loads(returned)
    except (ValueError, RecursionError):  # a program can write what no value is written as
        return False
    return value == expected or (isinstance(expected, list) and len(expected) == 1 and value == expected[0])
