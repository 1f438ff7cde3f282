"""What a response is worth: extraction, the named rewards, and names that cannot be resolved."""

import json
from itertools import product

import pytest

from megatron_pmd.config import REWARDS, Data, ReasoningGymSource, Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.sources import load_problems
from megatron_pmd.errors import ConfigError
from megatron_pmd.rewards.graders import extract, grader


def problem(answer: str) -> Problem:
    return Problem(7, ({"role": "user", "content": "?"},), answer)


@pytest.mark.parametrize(
    ("response", "integer"),
    [
        ("", ""),
        ("no number here", ""),
        ("3 + 4 = 7.", "7"),
        ("7\n", "7"),
        ("the answer is -3", "-3"),
        ("the answer is \u22123", "-3"),
        ("5-3", "3"),
        ("x-3", "3"),
        ("(2)-3", "3"),
        ("5 - 3", "3"),
        ("5 = -3", "-3"),
        ("answer:-3", "-3"),
        ("5--3", "-3"),
        (r"\boxed{-42}", "-42"),
        ("**-12**", "-12"),
        ("+5", "5"),
        ("1,234,567 people", "1234567"),
        ("-1,000", "-1000"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("007", "7"),
        ("-0", "0"),
        ("5 or 3.14", "5"),
        ("0.5", ""),
        (".5", ""),
        ("version 1.2.3", ""),
        ("x2", ""),
        ("12km", "12"),
        ("答案是-8。", "-8"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_the_last_integer_of_a_response(response, integer):
    assert extract(response, "last_integer") == integer


@pytest.mark.parametrize(
    ("response", "line"), [("a\n b \n\n", "b"), ("a", "a"), ("", ""), ("\n \n", ""), ("a\r\nb", "b")]
)
def test_the_last_line_that_is_not_blank(response, line):
    assert extract(response, "last_line") == line


def test_the_whole_response_is_left_as_it_is():
    assert extract(" a\n", "whole") == " a\n"


def test_exact_compares_stripped_texts():
    grade = grader(Reward(name="exact"))
    assert grade(" 42\n", problem("42")) == 1.0
    assert grade("42.", problem("42")) == 0.0


def test_only_the_extracted_part_is_graded():
    assert grader(Reward(name="exact", answer="last_integer"))("So it is 42.", problem("42")) == 1.0
    assert grader(Reward(name="exact", answer="last_line"))("Because\n42\n", problem("42")) == 1.0


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"Half, so the answer is $\frac{1}{2}$.", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", r"\frac12", 1.0),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1.0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        (r"first $3$, no: \boxed{4}", "4", 1.0),
        (r"\boxed{3}", "$3$", 1.0),
        ("the answer is 1234", "1,234", 1.0),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", 1.0),
        (r"$\frac{1}{3}$", r"\frac{1}{2}", 0.0),
        ("2", r"\frac{1}{2}", 0.0),
        ("no idea", "4", 0.0),
        ("", "4", 0.0),
        (r"\boxed{\frac{", "4", 0.0),
    ],
)
def test_math_grades_equality_not_spelling(response, answer, reward):
    assert grader(Reward(name="math"))(response, problem(answer)) == reward


def test_math_refuses_an_answer_without_mathematics():
    with pytest.raises(ValueError, match="problem 7: math-verify finds no mathematics"):
        grader(Reward(name="math"))("4", problem(""))


def test_math_works_outside_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(grader(Reward(name="math")), r"\boxed{4}", problem("4")).result() == 1.0


def test_chain_sum_is_graded_by_reasoning_gym():
    source = ReasoningGymSource(task="chain_sum", size=3, seed=1, parameters={"max_terms": 3})
    grade = grader(Reward(name="reasoning_gym", answer="last_integer"))
    for p in load_problems(source, Data(train=source)):
        left, *rest = p.metadata["entry"]["metadata"]["expression"].split()
        total = int(left) + sum(int(sign + term) for sign, term in zip(rest[::2], rest[1::2], strict=True))
        assert grade(f"That makes {total}.", p) == 1.0
        assert grade(f"That makes {total + 1}.", p) < 0.1


def test_a_task_with_many_right_answers_is_graded_by_its_own_rules():
    """graph_color has no answer of its own: every colouring of four vertices is checked against its edges."""
    size = {"min_num_vertices": 4, "max_num_vertices": 4}
    source = ReasoningGymSource(task="graph_color", size=1, seed=1, parameters=size)
    (p,) = load_problems(source, Data(train=source))
    puzzle = p.metadata["entry"]["metadata"]["puzzle"]
    grade = grader(Reward(name="reasoning_gym"))
    for colours in product(puzzle["color_options"], repeat=4):
        proper = all(colours[a] != colours[b] for a, b in puzzle["edges"])
        response = json.dumps({str(vertex): colour for vertex, colour in enumerate(colours)})
        assert (grade(response, p) == 1.0) == proper


def test_reasoning_gym_refuses_a_problem_of_a_file():
    with pytest.raises(ValueError, match="problem 7 has no 'task' in its metadata"):
        grader(Reward(name="reasoning_gym"))("4", problem("4"))


def test_a_reward_of_ones_own_is_named_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text("def length(response, problem):\n    return len(response)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert grader(Reward(name="own_reward:length"))("four", problem("")) == 4


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_every_registered_reward_resolves(name):
    assert callable(REWARDS.load(name, what="reward.name"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "maths",
            r"no reward \(did you mean math\?\); use code, environment, .*, or your own: module:name",
        ),
        ("my_rewards:", "or your own: module:name"),
        (":score", "or your own: module:name"),
        ("absent_module:score", r"absent_module cannot be imported: ModuleNotFoundError.*PYTHONPATH"),
        ("broken_reward:score", r"broken_reward cannot be imported: RuntimeError: no licence"),
        ("math:squirt", r"has no squirt \(did you mean sqrt\?\)"),
        ("math:pi", "pi is a float, not a function or class"),
    ],
)
def test_a_reward_that_cannot_be_resolved_is_a_configuration_error(name, message, tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        grader(Reward(name=name))
