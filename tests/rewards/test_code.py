"""Reward `code`: which program a response has, the forms of tests, and the page's example as it stands."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError, DataError, MissingPackage
from megatron_pmd.rewards.code import CodeReward, program_in
from megatron_pmd.rewards.code_tests import same_output
from megatron_pmd.rewards.grading import grading
from megatron_pmd.rewards.pool import Verdict
from tests.rewards import test_sandbox
from tests.test_tutorials import blocks

pytestmark = test_sandbox.pytestmark
SUM = "print(sum(map(int, input().split())))"
ADD = "def add(a, b): return a + b"
METHOD = "class Solution:\n    def add(self, a: int, b: int) -> List[int]: return a + b"


@pytest.fixture(scope="module")
def rewards() -> Iterator[CodeReward]:
    with CodeReward(Reward(name="code", workers=1, memory_gigabytes=0.2, timeout_seconds=30)) as made:
        yield made


def problem(tests: Any, **row: Any) -> Problem:
    answer = tests if isinstance(tests, str) else json.dumps(tests)
    return Problem(7, ({"role": "user", "content": "?"},), answer, metadata=row)


def graded(rewards: CodeReward, response: str, tests: Any, **row: Any) -> Verdict:
    return rewards.submit(response, problem(tests, **row)).result(timeout=90)


FORMS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "APPS, TACO": (SUM, {"inputs": ["1 2\n", "3 4"], "outputs": ["3\n", "7"]}, {}),
    "APPS, lines": (SUM, {"inputs": [["1 2", "9"]], "outputs": [["3", ""]]}, {}),
    "APPS, a function": (ADD, {"fn_name": "add", "inputs": [[1, 2], ["a", "b"]], "outputs": [[3], "ab"]}, {}),
    "LiveCodeBench, standard input": (SUM, [{"input": "1 2", "output": "3", "testtype": "stdin"}], {}),
    "LiveCodeBench, a method": (
        METHOD,
        [{"input": "[1]\n[2]", "output": "[1, 2]", "testtype": "functional"}],
        {"metadata": '{"func_name": "add"}'},
    ),
    "PRIME, a function": (
        ADD,
        [{"type": "function_call", "fn_name": "add", "input": [[1], [2]], "output": [1, 2]}],
        {},
    ),
    "MBPP": (ADD, ["assert add(1, 2) == 3", "assert add(*X) == 3"], {"test_setup_code": "X = (0, 3)"}),
    "HumanEval": (ADD, "def check(candidate):\n    assert candidate(1, 2) == 3\n", {"entry_point": "add"}),
}
"""Of published sets, a right program, its tests, and further columns."""


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_published_tests_tells_a_right_program_from_a_wrong_one(rewards, form):
    program, tests, row = FORMS[form]
    assert graded(rewards, program, tests, **row) == Verdict(1.0)
    wrong = program.replace("a + b", "[a, b, 0]").replace("sum(", "min(")
    assert graded(rewards, wrong, tests, **row) == Verdict(0.0)


def test_tests_can_be_a_column_of_the_row_as_parquet_has_them():
    column = Problem(7, (), "the solution", metadata={"gold": {"tests": ["assert add(1, 2) == 3"]}})
    with grading(Reward(name="code", workers=1, tests_key="gold.tests")) as rewards:
        assert rewards.grade([(ADD, column), (ADD.replace("+", "-"), column)]) == [Verdict(1.0), Verdict(0.0)]
        with pytest.raises(
            DataError, match=r"problem 7: no key 'gold\.tests', only level; set reward\.tests_key"
        ):
            rewards.grade([(ADD, Problem(7, (), "", metadata={"level": 1}))])


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("for in", "the tests of problem 7 are neither JSON nor Python: invalid syntax"),
        ("[]", "problem 7 has no tests"),
        ("3", "the tests of problem 7 have the form of a number that is none"),
        ({"inputs": ["1"], "outputs": []}, "the tests of problem 7 have the form of a object"),
        ([{"input": "1", "output": "1", "testtype": "functional"}], "none is named in fn_name"),
        ("", "the tests of problem 7 have the form of a string"),
    ],
)
def test_tests_that_cannot_be_run_cost_their_sample_and_are_named(rewards, tests, reason):
    verdict = graded(rewards, SUM, tests)
    assert verdict.reward == 0.0 and reason in str(verdict.error)


FAKES = [
    "print('ok')\nimport os; os._exit(0)",
    "import sys; sys.exit(0)",
    "import os\nfor f in range(3, 9):\n    try: os.write(f, b'passed')\n    except OSError: 0\nos._exit(0)",
    "import os, json\nwrite = os.write\njson.dumps = lambda *a: '3'\nos.write = lambda f, x: write(f, b'3')",
    "def add(a, b): raise SystemExit(0)",
    "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None",
]


@pytest.mark.parametrize("response", FAKES)
def test_a_result_that_is_only_claimed_is_worth_nothing(rewards, response):
    assert graded(rewards, response, ["assert add(1, 2) == 3", "assert False"]) == Verdict(0.0)
    assert graded(rewards, response, {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}) == Verdict(0.0)


def test_values_that_json_writers_and_readers_refuse_are_compared_or_worth_nothing(rewards):
    large = {"fn_name": "add", "inputs": [[10**30, 1], ["\ud800", "é"]], "outputs": [10**30 + 1, "\ud800é"]}
    assert graded(rewards, ADD, large) == Verdict(1.0)
    nested = "import os\nos.write(3, b'[' * 60_000)\nos._exit(0)"
    assert graded(rewards, nested, large) == Verdict(0.0)
    assert graded(rewards, "def add(a, b): return {1, 2}", large) == Verdict(0.0)
    deep = graded(rewards, ADD, "[" * 100_000)
    assert deep.reward == 0.0 and deep.error


def test_a_response_has_its_time_for_all_tests_together():
    slow = "import time; time.sleep(0.4); print(1)"
    with CodeReward(Reward(name="code", workers=1, timeout_seconds=2)) as rewards:
        assert graded(rewards, slow, {"inputs": [""], "outputs": ["1"]}) == Verdict(1.0)
        assert graded(rewards, slow, {"inputs": [""] * 6, "outputs": ["1"] * 6}) == Verdict(0.0)


def test_a_sandbox_that_dies_is_replaced_and_costs_nothing(rewards):
    os.kill(psutil.Process(rewards._all[0]._process.pid).children()[0].pid, signal.SIGKILL)
    assert graded(rewards, SUM, FORMS["APPS, TACO"][1]) == Verdict(1.0)


def test_a_machine_that_starts_no_process_for_a_while_costs_the_samples_of_that_time(monkeypatch):
    failures = iter([OSError(24, "Too many open files"), BlockingIOError(11, "Resource temporarily")] * 2)
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        if failure := next(failures, None):
            raise failure
        return popen(*arguments, **options)

    with CodeReward(Reward(name="code", workers=1, memory_gigabytes=0.2, timeout_seconds=30)) as rewards:
        rewards._threads.submit(rewards._replace).result()
        monkeypatch.setattr(subprocess, "Popen", start)
        found = [graded(rewards, SUM, FORMS["APPS, TACO"][1]) for _ in range(3)]
    said = "twice with this sample: no process could be started: [Errno 11] Resource temporarily"
    assert found == [Verdict(0.0, said)] * 2 + [Verdict(1.0)]


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("a = 1", "a = 1"),
        ("So:\n```python\na = 1\n```\nThat is it.", "a = 1"),
        ("```py\na\n```\nBetter:\n```\nb\n```", "b"),
        ("```python\na\n```\nIt prints\n```text\n1\n```\n", "a"),
        ("```python\na\n``", None),
        ("```cpp\nint a;\n```", None),
        ("<think>```python\nx\n```</think>```python\na\n```".replace("</think>", "</think>\n"), "a"),
        ("<think>```python\nx\n```", ""),
        ('```python\ns = """\n```python\n"""\n```', 's = """\n```python\n"""'),
    ],
)
def test_the_program_is_the_last_python_block_that_is_closed(response, program):
    assert program_in(response) == program


@pytest.mark.parametrize(
    ("written", "expected", "same"),
    [
        ("1  2\n3\n\n", "1 2\n3", True),
        ("0.3333334", "0.33333333", True),
        ("0.334", "0.333", False),
        ("1000000.5", "1000000.0", True),
        ("3.0", "3", False),
        ("nan", "1.0", False),
        ("inf", "1.0", False),
        ("yes", "YES", False),
        ("1 2 3", "1 2", False),
    ],
)
def test_outputs_are_compared_word_by_word_and_decimals_to_a_millionth(written, expected, same):
    assert same_output(written, expected) is same


def test_only_code_has_tests_and_a_run_without_bubblewrap_does_not_begin(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"reward\.name is 'exact', which runs no tests; set reward\.name=code"
    ):
        Reward(name="exact", tests_key="tests")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPackage, match="install the package bubblewrap"), grading(Reward(name="code")):
        pass


def test_the_page_on_code_prints_what_it_says(tmp_path: Path, monkeypatch, capsys):
    written = blocks("docs/code.md")
    for block in written[:2]:
        (tmp_path / block.title).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("grade.py")
    assert capsys.readouterr().out == written[3].text
