"""A few samples out of rollout and evaluation files, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_pmd.errors import DataError
from megatron_pmd.files import JsonObject
from megatron_pmd.observe.quantities import clip, finite

COLUMNS = [
    "group",
    "number",
    "branch",
    "source",
    "problem",
    "prompt",
    "response",
    "answer",
    "finish_reason",
    "weight_version",
    "reward",
    "advantage",
    "reward_error",
]
ABSENT_IN_OLD_FILES = {"branch", "source"}

Label = int | str
"""A problem's index, behind the name of its source where the run has several."""


def _label(row: JsonObject) -> Label:
    return f"{row['source']} {row['problem']}" if row.get("source") else row["problem"]


def evenly[T](items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def grades(path: Path) -> dict[Label, dict[int, float]]:
    """Mean reward of every group by problem: {problem: {group: mean reward}}, in the file's order."""
    table = _read(path, ["group", "number", "source", "problem", "reward"])
    groups: dict[tuple[Label, int], list[JsonObject]] = {}
    for row in table.to_pylist():
        groups.setdefault((_label(row), row["group"]), []).append(row)
    means: dict[Label, dict[int, float]] = {}
    for (problem, group), rows in groups.items():
        means.setdefault(problem, {})[group] = _mean(list(_rewards(rows).values()))
    return means


def _rewards(rows: Sequence[JsonObject]) -> dict[int, float]:
    """Of each response of a group; an agent's may have several rows."""
    return {row["number"]: row["reward"] for row in rows}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def read_prompts(path: Path, groups: Sequence[int], responses: int, limit: int) -> list[dict[str, Any]]:
    """The given groups with at most `responses` responses each, spread evenly over their rewards."""
    # a filter on read keeps the text of the other groups out of memory: a rollout may be gigabytes
    table = _read(path, [*COLUMNS, "response_tokens"], filters=[("group", "in", list(groups))])
    lengths = pc.list_value_length(table["response_tokens"]).to_pylist()
    rows = [
        {**row, "tokens": length}
        for row, length in zip(table.drop_columns("response_tokens").to_pylist(), lengths, strict=True)
    ]
    return [_prompt([r for r in rows if r["group"] == g], responses, limit) for g in groups]


def table_of_samples(path: Path, groups: int) -> tuple[list[str], list[list[Any]]]:
    """All responses to the first so many prompts of a file: names of the columns, and the rows."""
    table = _read(path, COLUMNS, filters=[("group", "<", groups)])
    rows = [finite(row) for row in table.to_pylist()]
    return table.column_names, [[row[name] for name in table.column_names] for row in rows]


def _prompt(rows: list[JsonObject], responses: int, limit: int) -> dict[str, Any]:
    ranked = sorted(rows, key=lambda r: (-(r["reward"] or 0.0), r["number"]))
    first, rewards = rows[0], _rewards(rows)
    return {
        "problem": _label(first),
        "group": first["group"],
        "prompt": clip(first["prompt"], limit),
        "answer": clip(first["answer"] or "", limit),
        "samples": len(rewards),
        "mean_reward": finite(_mean(list(rewards.values()))),
        "responses": [
            {
                "number": r["number"],
                "branch": r.get("branch"),
                "text": clip(r["response"], limit),
                "tokens": r["tokens"],
                "reward": finite(r["reward"]),
                "advantage": finite(r["advantage"]),
                "version": r["weight_version"],
                "finish": r["finish_reason"],
                "error": r["reward_error"],
            }
            for r in evenly(ranked, responses)
        ],
    }


def before_and_after(first: Path, last: Path, limit: int) -> tuple[JsonObject, JsonObject] | None:
    """One problem's answers in two evaluation files: the first whose grade changed, else the first of all."""
    before, after = grades(first), grades(last)
    common = [p for p in before if p in after]
    if not common:
        return None

    def mean(problem: Label, means: dict[Label, dict[int, float]]) -> float:
        return _mean(list(means[problem].values()))

    changed = [p for p in common if mean(p, before) != mean(p, after)]
    problem = (changed or common)[0]
    pair = [
        read_prompts(path, [next(iter(means[problem]))], 1, limit)[0]
        for path, means in ((first, before), (last, after))
    ]
    return pair[0], pair[1]


def _read(path: Path, columns: list[str], filters: Any = None) -> pa.Table:
    try:
        absent = ABSENT_IN_OLD_FILES - set(pq.read_schema(path).names)
        columns = [name for name in columns if name not in absent]
        return pq.read_table(path, columns=columns, filters=filters)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(f"{path}: not a rollout file of this program: {error}") from None
