"""Where problems come from: JSON lines, Parquet, a reasoning-gym generator, or an environment of verifiers.

Nothing is tokenised here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_pmd.config import (
    Data,
    FileSource,
    ProblemSource,
    ReasoningGymSource,
    Source,
    VerifiersSource,
)
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.rows import kind_of, read_rows, value_at
from megatron_pmd.environments.process import interpreter, process_of
from megatron_pmd.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


def problems_of(given: ProblemSource) -> list[Problem]:
    """As load_problems, with what a source of a list has of its own: name, reward, longest response.

    What a DataError says begins with the source where there are several.
    """
    with named(given):
        problems = load_problems(given.source, given.data)
    if not given.name:
        return problems
    most = given.max_response_tokens
    return [
        dataclasses.replace(
            problem,
            source=given.name,
            reward=given.reward,
            token_budget=min(filter(None, (problem.token_budget, most)), default=None),
        )
        for problem in problems
    ]


@contextmanager
def named(given: ProblemSource) -> Iterator[None]:
    """A DataError in here says which source it is of, where a run has several."""
    try:
        yield
    except DataError as error:
        if given.name:
            raise DataError(f"{given.key} ({given.name}): {error}") from None
        raise


def load_problems(source: Source, data: Data) -> list[Problem]:
    """Read every problem of a source, in its order, with data.system_prompt and data.prompt_suffix applied.

    Raises DataError for a missing, empty or malformed file (with its line or row, from 1), an unknown
    reasoning-gym task or environment, or parameters that it refuses.
    """
    if isinstance(source, ReasoningGymSource):
        return _generate(source, data)
    if isinstance(source, VerifiersSource):
        return _of_environment(source, data)
    return _read_file(source, data)


def check_source(given: ProblemSource) -> None:
    """Raise what problems_of would, as far as the first problem of a file tells; a task is not made yet, and
    an environment not loaded."""
    if isinstance(given.source, VerifiersSource):
        with named(given):
            interpreter(given.source.python, given.source.taskset)
    if isinstance(given.source, FileSource):
        with named(given):
            next(_problems_of(given.source, given.data))


def _read_file(source: FileSource, data: Data) -> list[Problem]:
    return list(_problems_of(source, data))


def _problems_of(source: FileSource, data: Data) -> Iterator[Problem]:
    index = -1
    for index, (where, row) in enumerate(read_rows(source.path)):
        yield _from_row(index, where, row, source, data)
    if index < 0:
        raise DataError(f"{source.path}: the file holds no problems; one a line or row is expected")


def _from_row(index: int, where: str, row: dict[str, Any], source: FileSource, data: Data) -> Problem:
    answer = value_at(row, source.answer_key, where, "answer_key")
    prompt = value_at(row, source.prompt_key, where, "prompt_key")
    holder = re.match(rf"{re.escape(source.prompt_key)}\.(-?\d+)", source.answer_key)
    if holder and isinstance(prompt, list):
        prompt = prompt[: int(holder[1])]  # a conversation of which one message has the answer
    budget = _number(row, "token_budget_key", source.token_budget_key, where)
    if budget is not None and (budget < 1 or budget != int(budget)):
        raise DataError(
            f"{where}: {source.token_budget_key!r} is {budget:g}; a whole number of tokens is expected"
        )
    return Problem(
        index=index,
        messages=_chat(prompt, f"{where}: {source.prompt_key!r}", data),
        answer=_answer(answer, f"{where}: {source.answer_key!r}"),
        metadata={k: v for k, v in row.items() if k not in (source.prompt_key, source.answer_key)},
        difficulty=_number(row, "difficulty_key", source.difficulty_key, where),
        token_budget=None if budget is None else int(budget),
        template_arguments=data.template_arguments,
    )


def _answer(value: Any, where: str) -> str:
    """The answer as text: a whole number without the `.0` that it gets in a column with missing values."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        if isinstance(value, list | dict) and value:
            first = next(iter(value)) if isinstance(value, dict) else 0
            inside = f"a key with a dot leads into it, as answer.{first}"
        else:
            inside = "give the row an answer, or remove it"
        raise DataError(f"{where} is a {kind_of(value)}; a string or a number is expected: {inside}")
    if isinstance(value, float):
        if not math.isfinite(value):
            what = "NaN, which pandas writes for a missing value" if math.isnan(value) else "infinite"
            raise DataError(f"{where} is {what}; remove the row, or give it an answer")
        if value.is_integer() and abs(value) < 2**53:  # beyond, a double does not hold every integer
            return str(int(value))
    return str(value)


def _number(row: dict[str, Any], setting: str, key: str | None, where: str) -> float | None:
    """The row's number under the key that the setting names; None where it names none, or for null."""
    if key is None:
        return None
    value = value_at(row, key, where, setting)
    if value is None or value != value:  # pandas writes NaN for a missing number
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: {key!r} is {value!r}; a number is expected")
    return float(value)


def _chat(prompt: Any, where: str, data: Data) -> tuple[dict[str, Any], ...]:
    """The messages of one prompt; the suffix goes to the last one, the system prompt before the first."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise DataError(f"{where} is a {kind_of(prompt)}; a string or a list of chat messages is expected")
    if not prompt:
        raise DataError(f"{where} is an empty list of messages; remove the row")
    messages = [_message(message, f"{where}, message {i}") for i, message in enumerate(prompt, start=1)]
    if messages[-1]["role"] != "user":
        raise DataError(
            f"{where} ends with the {messages[-1]['role']}'s message; the last must be the user's"
        )
    messages[-1]["content"] += data.prompt_suffix
    if data.system_prompt is not None:
        if any(message["role"] == "system" for message in messages):
            raise DataError(
                f"{where} has a system message of its own; leave data.system_prompt unset, or remove it"
            )
        messages.insert(0, {"role": "system", "content": data.system_prompt})
    return tuple(messages)


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message with all that its file says of it (name, tool_calls, …), but Parquet's nulls."""
    if not isinstance(message, dict) or "role" not in message:
        found = (
            f"has {', '.join(map(str, message)) or 'nothing'}"
            if isinstance(message, dict)
            else f"is a {kind_of(message)}"
        )
        raise DataError(f"{where} {found}; an object with role and content is expected")
    known = {key: value for key, value in message.items() if value is not None}
    role, content = message["role"], known.get("content")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; use one of {', '.join(ROLES)}")
    if content is None and known.get("tool_calls"):
        content = ""
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text") or "") for part in content)  # OpenAI's parts of a text
    if not isinstance(content, str):
        raise DataError(f"{where} has a {kind_of(content)} as content; a text is expected, and nothing else")
    if not content.strip() and not known.get("tool_calls"):
        raise DataError(f"{where} is empty; remove the row")
    return known | {"content": content}


def _generate(source: ReasoningGymSource, data: Data) -> list[Problem]:
    """Problems of a reasoning-gym task; metadata has `task`, `parameters` and `entry`, enough to score."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        near = difflib.get_close_matches(source.task, DATASETS, n=3, cutoff=0.4)
        raise DataError(f"{source.task!r} is not a reasoning-gym task{_did_you_mean(near)}")
    known = {field.name for field in dataclasses.fields(DATASETS[source.task][1])} - {"size", "seed"}
    for name in source.parameters:
        if name in ("size", "seed"):
            raise DataError(f"reasoning-gym task {source.task}: set {name} beside `parameters`, not in it")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise DataError(
                f"reasoning-gym task {source.task} has no parameter {name!r}{_did_you_mean(near)}; "
                f"it has {', '.join(sorted(known))}"
            )
    parameters = {**source.parameters, "size": source.size, "seed": source.seed}
    try:
        dataset = reasoning_gym.create_dataset(source.task, **parameters)
        entries = [dataset[i] for i in range(source.size)]
    except Exception as error:  # each task validates with whatever exception it likes, assertions included
        raise DataError(
            f"reasoning-gym task {source.task} refuses {parameters}: {type(error).__name__}: {error}"
        ) from error
    return [
        Problem(
            index=i,
            messages=_chat(entry["question"], f"reasoning-gym task {source.task}, entry {i}: question", data),
            # a task with many right answers has none of its own: only its scorer can tell
            answer="" if entry["answer"] is None else str(entry["answer"]),
            metadata={"task": source.task, "parameters": parameters, "entry": entry},
            template_arguments=data.template_arguments,
        )
        for i, entry in enumerate(entries)
    ]


SPEAKS_FIRST = "(The environment speaks first.)"
"""In the place of a prompt that an environment's tasks do not have."""


def _of_environment(source: VerifiersSource, data: Data) -> list[Problem]:
    """The tasks of an environment. Their messages are to be read: its program writes what the model sees.

    metadata has what plays them, as rollout/agents/verifiers.py takes it, in `verifiers`.
    """
    name = f"the environment {source.taskset}"
    if data.system_prompt is not None or data.prompt_suffix:
        raise DataError(
            f"data.system_prompt and data.prompt_suffix do not reach {name}, which writes its own prompts; "
            "verifiers' tasksets take a system_prompt among their parameters"
        )
    settings = source.settings | {"taskset": {**source.parameters, "id": source.taskset}}
    tasks = process_of(source.python, settings).tasks(source.size)
    if not tasks:
        raise DataError(f"{name} has no tasks with the parameters {source.parameters}")
    played = {"python": source.python, "settings": settings}
    return [
        Problem(
            index=index,
            messages=_chat(_prompt(task), f"{name}, task {index}", data),
            answer="",
            metadata={"verifiers": played | {"task": task}},
            template_arguments=data.template_arguments,
        )
        for index, task in enumerate(tasks)
    ]


def _prompt(task: dict[str, Any]) -> Any:
    """What verifiers' TaskData gives the model to begin with."""
    prompt = task.get("prompt") or SPEAKS_FIRST
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if task.get("system_prompt"):
        prompt = [{"role": "system", "content": task["system_prompt"]}, *prompt]
    return prompt


def _did_you_mean(near: list[str]) -> str:
    return f" (did you mean {' or '.join(near)}?)" if near else ""
