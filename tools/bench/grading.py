"""How often graders agree with a person; figures are in docs/benchmarks.md.

    python -m tools.bench.grading [--dapo FOLDER/math_dapo.py] [--half open] [--failures]

The answers and verdicts are in tests/rewards/grading. Graded are the pairs, as a box and behind `Answer:`,
and the whole responses. The graders: reward `math`; math-verify alone, with its own extraction and default
settings; DAPO's rule, if a copy of verl's `verl/utils/reward_score/math_dapo.py` is given.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import math_verify
import typer

from megatron_pmd.data.problems import Problem
from megatron_pmd.rewards.mathematics import score

FOLDER = Path(__file__).parents[2] / "tests" / "rewards" / "grading"
FORMS = {"boxed": r"\boxed{{{}}}", "answer line": "Answer: {}"}
"""What a pair's answer is put into."""


@dataclass(frozen=True)
class Case:
    """One response with a person's verdict."""

    form: str
    kind: str
    reference: str
    response: str
    right: bool
    truncated: bool
    half: str
    dapo: bool
    """What DAPO's published rule says; False for a form that it has no word for."""


Judge = Callable[[Case], bool]


def cases() -> Iterator[Case]:
    for row in _rows("pairs.jsonl"):
        for form, template in FORMS.items():
            yield _case(form, row, template.format(row["answer"]), dapo=row["dapo"] and form == "answer line")
    for row in _rows("responses.jsonl"):
        yield _case("whole response", row, row["response"], dapo=row["dapo"])


def _case(form: str, row: dict[str, Any], response: str, *, dapo: bool) -> Case:
    truncated = row.get("truncated", False)
    return Case(form, row["class"], row["gold"], response, row["right"], truncated, row["half"], dapo)


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def ours(case: Case) -> bool:
    return score(case.response, Problem(0, (), case.reference), truncated=case.truncated) == 1.0


def math_verify_alone(case: Case) -> bool:
    gold = math_verify.parse(f"${case.reference}$", parsing_timeout=None)
    return math_verify.verify(
        gold, math_verify.parse(case.response, parsing_timeout=None), timeout_seconds=None
    )


def dapos_rule(path: Path) -> Judge:
    """The rule in a local copy of verl's math_dapo.py."""
    spec = importlib.util.spec_from_file_location("math_dapo", path)
    assert spec is not None and spec.loader is not None, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda case: module.compute_score(case.response, case.reference)["acc"]


def main(
    dapo: Annotated[Path | None, typer.Option(help="a copy of verl's math_dapo.py")] = None,
    half: Annotated[str, typer.Option(help="open, held_out, later, or all")] = "all",
    failures: Annotated[
        bool, typer.Option(help="print what a person judges otherwise than reward math")
    ] = False,
) -> None:
    logging.disable(logging.CRITICAL)
    judges: dict[str, Judge] = {"reward math": ours, "math-verify alone": math_verify_alone}
    if dapo is not None:
        judges["DAPO's rule"] = dapos_rule(dapo)
    chosen = [case for case in cases() if half in ("all", case.half)]
    for name, judge in judges.items():
        for form in dict.fromkeys(case.form for case in chosen):
            judged = [(case, judge(case)) for case in chosen if case.form == form]
            wrong = [(case, verdict) for case, verdict in judged if verdict != case.right]
            paid = sum(verdict for _, verdict in wrong)
            share = 1 - len(wrong) / len(judged)
            print(f"{name:18} {form:15} {len(judged):4} cases, agreement {share:.3f}, {paid} paid wrongly")
            for case, _ in wrong if failures and judge is ours else []:
                print(f"    [{case.kind}] {case.reference!r}: {case.response!r} is {case.right}")


if __name__ == "__main__":
    typer.run(main)
