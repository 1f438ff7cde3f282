"""Reward `math` beside verdicts of a person, and beside DAPO's published rule."""

from __future__ import annotations

from collections import defaultdict

import pytest

from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.rewards.graders import grader
from recipes.dapo import signed_score
from tools.bench.grading import FORMS, Case, cases, ours


def problem(answer: str) -> Problem:
    return Problem(7, (), answer)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, list[tuple[Case, bool]]]:
    """form -> each case with what the reward says."""
    found: dict[str, list[tuple[Case, bool]]] = defaultdict(list)
    for case in cases():
        found[case.form].append((case, ours(case)))
    return found


@pytest.mark.parametrize(("form", "at_least"), [*((form, 200) for form in FORMS), ("whole response", 80)])
def test_grading_agrees_with_a_person_and_pays_nothing_wrong(verdicts, form, at_least):
    of_form = verdicts[form]
    assert len(of_form) >= at_least
    assert [(case.reference, case.response) for case, paid in of_form if paid and not case.right] == []
    assert sum(paid == case.right for case, paid in of_form) / len(of_form) >= 0.97


def test_what_dapos_rule_pays_is_paid(verdicts):
    """Its verdicts are recorded, with the published code: 1 where the text behind `Answer:` is the same."""
    recorded = [(case, paid) for of_form in verdicts.values() for case, paid in of_form if case.dapo]
    assert len(recorded) > 90
    assert [(case.reference, case.response) for case, paid in recorded if not paid] == []


@pytest.mark.parametrize(
    ("response", "truncated", "reward"),
    [
        ("Answer: 34", False, 1.0),
        ("Answer: 35", False, -1.0),
        ("Answer: 34\n\nBecause", True, 1.0),
        ("34", True, -1.0),
    ],
)
def test_the_recipes_rewards_are_1_and_minus_1(response, truncated, reward):
    assert signed_score(response, problem("34"), truncated=truncated) == reward


def test_a_cut_response_has_no_answer_on_its_last_line():
    grade = grader(Reward(name="math"))
    response = "From the second equation,\n$$2x + 3 = 71$$\n$$x = 34$$"
    assert grade(response, problem("34")) == 1.0
    assert grade(response, problem("34"), truncated=True) == 0.0
    assert grade(f"{response}\nAnswer: 34\nThis is", problem("34"), truncated=True) == 1.0


def test_a_number_that_was_cut_is_no_answer():
    """34 was to come."""
    grade = grader(Reward(name="math"))
    for response in ("The answer is 3", "So $x=3$.\nAnswer: 3", r"It is $\boxed{3"):
        assert grade(response, problem("3"), truncated=True) == 0.0
    assert grade("The answer is 34. To see", problem("34"), truncated=True) == 1.0
    assert grade("Answer: 3", problem("3")) == 1.0
    # boxes are whole wherever the response was cut, and far from one another
    boxes = r"First $\boxed{12}$. This was wrong: it is $\boxed{34}$, because 34 is what"
    assert grade(boxes, problem("34"), truncated=True) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Dividing by 3 gives\n2x = 4", "4"),
        ("#### 4. Conclusion\nThis is hard.", "4"),
        ("Answer: 2 hours and 30 minutes", "2"),
        ("The answer is 7 million.", "7"),
        ("Let's answer: what is 5?", "5"),
        (r"\boxed{100200}", "(100,200)"),
        ("30\n31\n32\n33\n34", "34"),
        (r"\boxed{0.5\%}", r"50\%"),
        (r"\boxed{0.5\%}", "50%"),
        ("Answer: 1%", "100%"),
        ("Answer: A square has four sides", "A"),
        ("So, for $n=3$ there are $34$ subsets.", "34"),
    ],
)
def test_a_number_that_belongs_to_something_else_is_no_answer(response, answer):
    assert grader(Reward(name="math"))(response, problem(answer)) == 0.0


@pytest.mark.parametrize(
    "response",
    ["\\boxed{" * 5000, "\n" * 30_000, "numbers 1, " * 5000, "\\[" * 15_000, "So " + "1 a " * 9000 + "."],
)
def test_a_degenerate_response_is_graded_in_a_second(response):
    import time

    start = time.process_time()
    assert grader(Reward(name="math"))(response, problem("34")) == 0.0
    assert time.process_time() - start < 1
