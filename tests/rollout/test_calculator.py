"""The calculator tool: what it computes, what it refuses, and that nothing hurts who called it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import psutil
import pytest

from megatron_pmd.rollout.tools import calculator
from megatron_pmd.rollout.tools.python import Limits, run_python
from tests.rollout.test_episode import answering
from tests.rollout.test_sampler import Numbers, rollout_for, sampler_for
from tools.bench.stub_engine import StubEngine, serving


def result(code: str, **limits: float) -> str:
    return asyncio.run(run_python(code, Limits(**limits)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "code, shown",
    [
        ("6 * 7", "42\n"),
        ("x = 3\nprint(x)\nx ** 2", "3\n9\n"),
        ("import math\nmath.comb(50, 25)", "126410606437752\n"),
        ("from fractions import Fraction\nFraction(1, 3) + Fraction(1, 6)", "Fraction(1, 2)\n"),
        ("def f(n):\n    return n if n < 2 else f(n-1) + f(n-2)\nf(15)", "610\n"),
        ("x = 1", ""),
        ("", ""),
    ],
)
def test_it_shows_what_an_interpreter_would(code, shown):
    assert result(code) == shown


@pytest.mark.parametrize(
    "code, error",
    [
        ("1 / 0", "ZeroDivisionError: division by zero\n"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("raise SystemExit(0)", "SystemExit: 0\n"),
        ("[0] * 10**9", "MemoryError"),
        ("open('/etc/passwd').read()", "PermissionError: not allowed here: open"),
        ("import os\nos.remove('/tmp/x')", "PermissionError: not allowed here: os.remove"),
        ("import os\nos.system('true')", "PermissionError: not allowed here: os.system"),
        ("import os\nos.fork()", "PermissionError: not allowed here: os.fork"),
        ("import socket", "PermissionError: not allowed here: open"),
    ],
)
def test_an_error_or_a_refusal_is_one_line(code, error):
    shown = result(code)
    assert shown.startswith(error) and shown.count("\n") <= 1


@pytest.mark.parametrize("code", ["while True: pass", "import time\ntime.sleep(60)"])
def test_a_program_without_end_is_ended_and_leaves_no_process(code):
    begun = time.monotonic()
    assert result(code, seconds=0.3) == "TimeoutError: no result within 0.3 s"
    assert time.monotonic() - begun < 5
    assert not [p for p in psutil.Process().children(recursive=True) if "limited.py" in " ".join(p.cmdline())]


def test_output_without_end_is_cut():
    shown = result("while True: print('a' * 100)", output_bytes=1000, seconds=2)
    assert 1000 <= len(shown) < 1100 and shown.count("a") > 900


def test_it_cannot_see_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "42")
    assert result("import os\ndict(os.environ).get('SECRET')") == ""


def test_the_last_python_block_of_a_turn_is_run():
    assert calculator.last_block("so\n```python\n1+1\n```\nand\n```python\n2+2\n```") == "2+2\n"
    assert calculator.last_block("```\n1+1\n```") is None


class Talking(Numbers):
    """Token 3 is a turn with a computation, token 4 one without; the result is read back as a token."""

    def decode(self, tokens, **_):
        return {3: "```python\n40 + 1\n```", 4: "41"}.get(tokens[-1], "") if len(tokens) == 1 else "all"

    def apply_chat_template(self, messages, **_):
        return messages[1]["content"] + f" {messages[2]['role']} {messages[2]['content']}"

    def encode(self, text, **_):
        assert text.split() == ["user", "Output:", "41"]
        return [41]


def test_the_model_is_shown_what_its_code_prints_and_its_last_turn_is_graded():
    engine, graded = StubEngine(), []
    engine.generate = answering([3], [4])  # type: ignore[method-assign]

    def score(text: str, _: object) -> float:
        graded.append(text)
        return 1.0

    with serving(engine) as url:
        rollout = rollout_for(1, samples_per_prompt=1)
        sampler = sampler_for(url, score, function=calculator.rollout, max_turns=4)
        replace(sampler, tokenizer=Talking()).run(rollout)
    assert rollout.samples(Talking())[0].response_tokens.tolist() == [3, 41, 4]
    assert graded == ["41"]
