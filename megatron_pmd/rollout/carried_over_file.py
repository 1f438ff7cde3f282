"""Files of groups: one is part of every checkpoint, of what a rollout leaves over for the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_pmd.batch import Segment
from megatron_pmd.data.problems import Key, Problem
from megatron_pmd.errors import CheckpointError
from megatron_pmd.files import whole_file
from megatron_pmd.rollout.groups import Group
from megatron_pmd.rollout.trajectory import Trajectory, Turn
from megatron_pmd.rollout_file import SEGMENTS

FILE = "carried_over.parquet"

SCHEMA = pa.schema(
    [
        ("begun", pa.int64()),
        ("place", pa.int64()),
        ("source", pa.string()),
        ("problem", pa.int64()),
        ("number", pa.int32()),
        ("branch", pa.int32()),
        ("own_prompt", pa.list_(pa.int32())),
        ("seed", pa.int64()),
        (
            "turns",
            pa.list_(
                pa.struct(
                    [
                        ("tokens", pa.list_(pa.int32())),
                        ("log_probs", pa.list_(pa.float32())),
                        ("segments", pa.list_(SEGMENTS)),
                        ("finish", pa.string()),
                        ("counted", pa.bool_()),
                    ]
                )
            ),
        ),
        ("response", pa.string()),
        ("reward", pa.float64()),
        ("reward_error", pa.string()),
        ("stopped", pa.string()),
        ("routed_experts", pa.binary()),
        ("routed_experts_shape", pa.list_(pa.int32())),
        ("teacher_log_probs", pa.list_(pa.float32())),
    ]
)


def write_carried_over(folder: Path, groups: Sequence[Group]) -> None:
    """Write FILE into a checkpoint's folder."""
    write_groups(folder / FILE, groups)


def read_carried_over(folder: Path, problem: Callable[[Key], Problem]) -> list[Group]:
    """The groups written into a checkpoint's folder; none if it has no such file. The rest as read_groups."""
    path = folder / FILE
    return read_groups(path, problem) if path.exists() else []


def write_groups(path: Path, groups: Sequence[Group]) -> None:
    """One row a response, or a trajectory of one; under its own name only when it is whole."""
    rows = [
        _row(group, part, branch)
        for group in groups
        for member in group.members
        for branch, part in enumerate(member.parts)
    ]
    with whole_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)


def read_groups(path: Path, problem: Callable[[Key], Problem]) -> list[Group]:
    """The groups of a file that write_groups wrote.

    problem: the training problem of a key. CheckpointError if the file cannot be read.
    """
    try:
        rows = pq.read_table(path, schema=SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    groups: dict[tuple[int, int], Group] = {}
    for row in rows:
        key = row["begun"], row["place"]
        if key not in groups:
            groups[key] = Group(*key, problem((row["source"] or "", row["problem"])), [])
        part = _part(row, groups[key].problem)
        if row["branch"]:
            groups[key].members[-1].branches.append(part)
        else:
            groups[key].members.append(part)
    return list(groups.values())


def _row(group: Group, member: Trajectory, branch: int) -> dict[str, Any]:
    turns = [
        {
            "tokens": turn.tokens,
            "log_probs": turn.log_probs,
            "segments": [vars(segment) for segment in turn.segments],
            "finish": turn.finish,
            "counted": turn.counted,
        }
        for turn in member.turns
    ]
    recorded = member.routed_experts
    return {
        "begun": group.begun, "place": group.place, "source": group.problem.source,
        "problem": group.problem.index, "number": member.number, "branch": branch,
        "own_prompt": member.own_prompt,
        "seed": member.seed, "turns": turns, "response": member.response, "reward": member.reward,
        "reward_error": member.reward_error, "stopped": member.stopped,
        "routed_experts": None if recorded is None else recorded.tobytes(),
        "routed_experts_shape": None if recorded is None else recorded.shape,
        "teacher_log_probs": member.teacher_log_probs,
    }  # fmt: skip


def _part(row: dict[str, Any], problem: Problem) -> Trajectory:
    turns = [
        Turn(
            np.array(turn["tokens"], np.int32),
            np.array(turn["log_probs"], np.float32),
            [Segment(**segment) for segment in turn["segments"]],
            turn["finish"],
            turn["counted"],
        )
        for turn in row["turns"]
    ]
    part = Trajectory(
        problem, row["number"], row["seed"], turns, row["response"], row["reward"], row["reward_error"],
        row["stopped"], _recorded(row["routed_experts"], row["routed_experts_shape"]),
    )  # fmt: skip
    if row["own_prompt"] is not None:
        part.own_prompt = tuple(row["own_prompt"])
    if row["teacher_log_probs"] is not None:
        part.teacher_log_probs = np.array(row["teacher_log_probs"], np.float32)
    return part


def _recorded(data: bytes | None, shape: list[int] | None) -> np.ndarray | None:
    """Recorded experts, of the unsigned type that so many numbers in so many bytes have."""
    if data is None or shape is None:
        return None
    return np.frombuffer(data, f"u{len(data) // max(1, math.prod(shape))}").reshape(shape)
