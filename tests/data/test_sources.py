"""Problems from files and generators; every bad input is a DataError that names the place."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_pmd.config import Data, FileSource, ReasoningGymSource, Source
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.sources import load_problems
from megatron_pmd.errors import DataError

GOOD = {"prompt": "1 + 1?", "answer": "2"}


def load(source: Source, **settings: Any) -> list[Problem]:
    return load_problems(source, Data(train=source, **settings))


def jsonl(folder: Path, *lines: Any) -> FileSource:
    path = folder / "problems.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return FileSource(path=str(path))


def parquet(folder: Path, rows: list[dict[str, Any]]) -> FileSource:
    path = folder / "problems.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return FileSource(path=str(path))


def test_a_line_becomes_a_problem_with_its_other_columns_as_metadata(tmp_path):
    source = jsonl(tmp_path, {**GOOD, "level": 3}, {"prompt": "2 + 2?", "answer": 4})
    first, second = load(source)
    assert first == Problem(0, ({"role": "user", "content": "1 + 1?"},), "2", {"level": 3})
    assert (second.index, second.answer, second.metadata) == (1, "4", {})


def test_the_last_line_may_lack_its_newline(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(GOOD))
    assert len(load(FileSource(path=str(path)))) == 1


def test_a_byte_order_mark_and_blank_lines_are_read_over_and_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode() + b"\n \n"
    )
    assert len(load(FileSource(path=str(path)))) == 2
    path.write_bytes(path.read_bytes() + b"{")
    with pytest.raises(DataError, match=r":5: not JSON"):
        load(FileSource(path=str(path)))


def test_files_of_verl_slime_and_nemo_rl_are_read_by_their_keys(tmp_path):
    """As verl's examples/data_preprocess/gsm8k.py, slime's dapo-math-17k and NeMo-RL's datasets have them."""
    user = {"role": "user", "content": "1 + 1?"}
    verl = {
        "data_source": "openai/gsm8k", "prompt": [user], "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"split": "train", "index": 0},
    }  # fmt: skip
    nemo_rl = {"messages": [user, {"role": "assistant", "content": "2"}], "task_name": "math"}
    sources = [
        parquet(tmp_path, [verl]).model_copy(update={"answer_key": "reward_model.ground_truth"}),
        jsonl(tmp_path, {"prompt": [user], "label": "2"}).model_copy(update={"answer_key": "label"}),
    ]
    for source in sources:
        (problem,) = load(source)
        assert (problem.messages, problem.answer) == ((user,), "2")
    for row, prompt_key, answer_key in (
        ({"input": "1 + 1?", "output": "2"}, "input", "output"),
        (nemo_rl, "messages", "messages.-1.content"),
    ):
        source = jsonl(tmp_path, row)
        keys = {"prompt_key": prompt_key, "answer_key": answer_key}
        (problem,) = load(source.model_copy(update=keys))
        assert (problem.messages, problem.answer) == ((user,), "2")


def test_a_path_that_leads_nowhere_names_what_there_is(tmp_path):
    row = {"prompt": "x", "reward_model": {"ground_truth": "2", "style": "rule"}, "choices": ["1", "2"]}
    source = jsonl(tmp_path, row)
    assert load(source.model_copy(update={"answer_key": "choices.1"}))[0].answer == "2"
    for key in ("reward_model.gold", "choices.2", "answer"):
        with pytest.raises(
            DataError, match=r"only choices, prompt, reward_model\.ground_truth, reward_model\.style"
        ):
            load(source.model_copy(update={"answer_key": key}))


def test_what_else_a_message_says_goes_to_the_template_and_nulls_do_not(tmp_path):
    """Parquet gives every message of a column the same keys."""
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "1 + 1?", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "a"},
        {"role": "user", "content": "Sure?"},
    ]
    expected = (turns[0], turns[1] | {"content": ""}, turns[2], turns[3])
    for source in (
        parquet(tmp_path, [{"prompt": turns, "answer": "2"}]),
        jsonl(tmp_path, {"prompt": turns, "answer": "2"}),
    ):
        assert load(source)[0].messages == expected


def test_a_column_of_integers_that_became_floats_gives_integers(tmp_path):
    """pandas does it where a value of the column is missing; 2**53 and above a double is no exact integer."""
    rows = [
        {"prompt": "x", "answer": answer, "limit": limit}
        for answer, limit in ((34.0, 8.0), (0.5, float("nan")))
    ]
    keys = {"token_budget_key": "limit", "difficulty_key": "limit"}
    for source in (parquet(tmp_path, rows), jsonl(tmp_path, *rows)):
        first, second = load(source.model_copy(update=keys))
        assert (first.answer, first.token_budget) == ("34", 8)
        assert (second.answer, second.token_budget, second.difficulty) == ("0.5", None, None)
    assert load(jsonl(tmp_path, {"prompt": "x", "answer": 1e300}))[0].answer == "1e+300"


def test_several_files_compressed_ones_and_slices_of_them_are_one_source(tmp_path):
    rows = [{"prompt": f"{i}?", "answer": i} for i in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name in ("a.jsonl", "b.jsonl.gz", "c.json.zst"):
        with pa.output_stream(tmp_path / name, compression="detect") as file:
            file.write(lines)
    parts = (f"{tmp_path}/a.jsonl@[0:2]", f"{tmp_path}/b.jsonl.gz", f"{tmp_path}/c.json.zst@[-1:]")
    problems = load(FileSource(path=parts))
    assert [p.answer for p in problems] == ["0", "1", "0", "1", "2", "3", "4", "4"]
    assert [p.index for p in problems] == list(range(8))
    with pytest.raises(DataError, match=r"none of the 5 rows of .*a\.jsonl is in this slice"):
        load(FileSource(path=f"{tmp_path}/a.jsonl@[9:]"))
    (tmp_path / "d.jsonl.gz").write_bytes((tmp_path / "b.jsonl.gz").read_bytes()[:20])
    with pytest.raises(DataError, match=r"d\.jsonl\.gz: cannot be read: .*; is the file complete\?"):
        load(FileSource(path=f"{tmp_path}/d.jsonl.gz"))


def test_keys_of_the_source_name_the_columns(tmp_path):
    source = jsonl(tmp_path, {"question": "1 + 1?", "gold": "2", "prompt": "kept as metadata"})
    named = source.model_copy(update={"prompt_key": "question", "answer_key": "gold"})
    assert load(named)[0].metadata == {"prompt": "kept as metadata"}


def test_a_row_may_limit_its_responses_and_say_how_hard_it_is(tmp_path):
    rows: list[dict[str, Any]] = [{**GOOD, "limit": 64, "level": 2.5}, {**GOOD, "limit": None, "level": 1}]
    keys = {"token_budget_key": "limit", "difficulty_key": "level"}
    for source in (jsonl(tmp_path, *rows), parquet(tmp_path, rows)):
        problems = load(source.model_copy(update=keys))
        assert [(p.token_budget, p.difficulty) for p in problems] == [(64, 2.5), (None, 1.0)]
    wrong = jsonl(tmp_path, {**GOOD, "limit": 0.5}).model_copy(update={"token_budget_key": "limit"})
    with pytest.raises(DataError, match=r":1: 'limit' is 0\.5; a whole number of tokens"):
        load(wrong)


def test_parquet_and_json_lines_give_the_same_problems(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": chat, "answer": "2", "level": i} for i in range(3)]
    assert load(parquet(tmp_path, rows)) == load(jsonl(tmp_path, *rows))


def test_system_prompt_comes_first_and_the_suffix_ends_the_last_message(tmp_path):
    turns = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    source = jsonl(tmp_path, GOOD, {"prompt": turns, "answer": "4"})
    text, chat = load(source, system_prompt="Be brief.", prompt_suffix=" Answer:")
    assert [m["content"] for m in text.messages] == ["Be brief.", "1 + 1? Answer:"]
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in chat.messages] == ["Be brief.", "1 + 1?", "2", "And 2 + 2? Answer:"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', r"problems\.jsonl:2: not JSON"),
        ({"prompt": "x", "answer": float("nan")}, r":2: 'answer' is NaN, which pandas writes"),
        ({"prompt": "x", "answer": float("inf")}, r":2: 'answer' is infinite"),
        ("[1]", r":2: a list where an object"),
        ({"answer": "2"}, r":2: no key 'prompt', only answer"),
        ({"prompt": "x"}, r":2: no key 'answer', only prompt"),
        ({"prompt": 7, "answer": "2"}, r":2: 'prompt' is a number"),
        ({"prompt": None, "answer": "2"}, r":2: 'prompt' is a null"),
        ({"prompt": "x", "answer": None}, r":2: 'answer' is a null"),
        ({"prompt": "x", "answer": True}, r":2: 'answer' is a boolean"),
        ({"prompt": "x", "answer": ["2"]}, r":2: 'answer' is a list"),
        ({"prompt": " \n", "answer": "2"}, r":2: 'prompt', message 1 is empty"),
        ({"prompt": [], "answer": "2"}, r":2: 'prompt' is an empty list"),
        ({"prompt": ["x"], "answer": "2"}, r":2: 'prompt', message 1 is a string"),
        ({"prompt": [{"role": "user"}], "answer": "2"}, r":2: 'prompt', message 1 has a null as content"),
        ({"prompt": [{"content": "x"}], "answer": "2"}, r"message 1 has content; .* role and content"),
        (
            {"prompt": [{"role": "human", "content": "x"}], "answer": "2"},
            r"the role 'human'; use one of system",
        ),
        ({"prompt": [{"role": "user", "content": [1]}], "answer": "2"}, r"has a list as content"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "answer": "2"},
            r"ends with the assistant's message",
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        load(jsonl(tmp_path, GOOD, line, GOOD))


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff", "answer": "2"}\n')
    with pytest.raises(DataError, match=r":2: not JSON.*utf-8"):
        load(FileSource(path=str(path)))


def test_two_system_prompts_are_refused(tmp_path):
    chat = [{"role": "system", "content": "A"}, {"role": "user", "content": "x"}]
    with pytest.raises(DataError, match=r":1: 'prompt' has a system message of its own"):
        load(jsonl(tmp_path, {"prompt": chat, "answer": "2"}), system_prompt="B")


def test_a_blank_file_holds_no_problems(tmp_path):
    with pytest.raises(DataError, match="holds no problems"):
        load(jsonl(tmp_path))
    schema = pa.schema([("prompt", pa.string()), ("answer", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="holds no problems"):
        load(FileSource(path=str(tmp_path / "empty.parquet")))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        load(FileSource(path=str(tmp_path / "absent.jsonl")))


def test_an_unknown_suffix_names_the_known_ones(tmp_path):
    (tmp_path / "problems.csv").write_text("prompt,answer\n")
    with pytest.raises(DataError, match=r"'\.csv'; use \.jsonl .* or \.parquet"):
        load(FileSource(path=str(tmp_path / "problems.csv")))


def test_a_missing_parquet_column_is_named_with_the_present_ones(tmp_path):
    with pytest.raises(DataError, match=r"row 1: no key 'answer', only prompt, solution"):
        load(parquet(tmp_path, [{"prompt": "x", "solution": "2"}]))


def test_a_bad_parquet_row_is_named_by_its_number(tmp_path):
    with pytest.raises(DataError, match=r"problems\.parquet, row 2: 'answer' is a null"):
        load(parquet(tmp_path, [GOOD, {"prompt": "x", "answer": None}]))


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "fake.parquet").write_text("prompt")
    with pytest.raises(DataError, match=r"fake\.parquet: not a readable Parquet file"):
        load(FileSource(path=str(tmp_path / "fake.parquet")))


def test_reasoning_gym_problems_are_its_entries_and_repeat_for_a_seed():
    source = ReasoningGymSource(
        task="chain_sum", size=4, seed=5, parameters={"min_terms": 2, "max_terms": 2, "max_digits": 1}
    )
    problems = load(source, prompt_suffix=" Give the number only.")
    assert problems == load(source, prompt_suffix=" Give the number only.")
    for problem in problems:
        entry = problem.metadata["entry"]
        assert problem.messages[0]["content"] == entry["question"] + " Give the number only."
        assert problem.answer == entry["answer"]
        left, operator, right = entry["metadata"]["expression"].split()
        assert int(problem.answer) == int(left) + (1 if operator == "+" else -1) * int(right)
    assert problems[0].metadata["task"] == "chain_sum"
    assert problems[0].metadata["parameters"] == {**source.parameters, "size": 4, "seed": 5}
    assert problems != load(source.model_copy(update={"seed": 6}), prompt_suffix=" Give the number only.")


def test_a_task_without_an_answer_of_its_own_has_an_empty_one():
    assert load(ReasoningGymSource(task="graph_color", size=1))[0].answer == ""


@pytest.mark.parametrize(
    ("task", "parameters", "message"),
    [
        ("chainsum", {}, r"'chainsum' is not a reasoning-gym task \(did you mean chain_sum"),
        ("chain_sum", {"min_digit": 1}, r"no parameter 'min_digit' \(did you mean min_digits\?\); it has"),
        ("chain_sum", {"seed": 1}, r"set seed beside `parameters`"),
        ("chain_sum", {"min_terms": 0}, r"refuses .*min_terms must be positive"),
        ("chain_sum", {"min_terms": "many"}, r"refuses .*TypeError"),
    ],
)
def test_a_task_or_parameter_that_reasoning_gym_lacks_is_named(task, parameters, message):
    with pytest.raises(DataError, match=message):
        load(ReasoningGymSource(task=task, size=2, parameters=parameters))
