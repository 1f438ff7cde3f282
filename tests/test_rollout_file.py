"""The file of a rollout: what is in it, in which types, and that training need not wait for it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_pmd import rollout_file
from megatron_pmd.batch import Sample
from megatron_pmd.errors import DataError
from megatron_pmd.observe.samples import grades, read_prompts
from megatron_pmd.rollout_file import RolloutWriter, check_rollouts, read_rollout, write_rollout


def sample(number: int, **changes: Any) -> Sample:
    values: dict[str, Any] = dict(
        group=number // 2, number=number % 2, problem=4, prompt="τ?", response=f"{number}!", answer="!",
        prompt_tokens=np.arange(3), response_tokens=np.arange(10, 11 + number),
        engine_log_probs=-np.arange(1 + number) / 3, finish_reason="stop", weight_version=7, seed=3,
    )  # fmt: skip
    return Sample(**values | changes)


def routed(number: int, dtype: type[np.generic], largest: int) -> Sample:
    made = sample(number)
    made.routed_experts = np.full((len(made.tokens) - 1, 6), largest, dtype)
    return made


def test_a_file_of_many_row_groups_is_read_by_others_as_lists_of_numbers(tmp_path, monkeypatch):
    """pyarrow's own conversion to Python, which this program does not use."""
    monkeypatch.setattr(rollout_file, "ROWS_TOGETHER", 3)
    samples = [sample(i) for i in range(8)]
    write_rollout(tmp_path / "7.parquet", samples, 7)
    table = pq.read_table(tmp_path / "7.parquet")
    assert pq.ParquetFile(tmp_path / "7.parquet").num_row_groups == 3
    for row, written in zip(table.to_pylist(), samples, strict=True):
        assert row["response_tokens"] == written.response_tokens.tolist()
        assert row["engine_log_probs"] == written.engine_log_probs.tolist()
        assert row["segments"] == [
            {
                "tokens": len(written.response_tokens),
                "weight_version": 7,
                "counted": True,
                "stale_cache": False,
            }
        ]
        assert (row["prompt"], row["response"], row["reward_error"]) == ("τ?", written.response, None)
    read, _ = read_rollout(tmp_path / "7.parquet")
    assert [s.engine_log_probs.tolist() for s in read] == [s.engine_log_probs.tolist() for s in samples]
    assert {s.response_tokens.dtype.name for s in read} == {"int32"}


def test_recorded_experts_are_in_one_type_that_holds_all_and_some_samples_may_have_none(tmp_path):
    written = [routed(0, np.uint8, 200), sample(1), routed(2, np.uint16, 300)]
    write_rollout(tmp_path / "0.parquet", written, 0)
    read, _ = read_rollout(tmp_path / "0.parquet")
    assert read[1].routed_experts is None
    for before, after in zip(written[::2], read[::2], strict=True):
        assert before.routed_experts is not None and after.routed_experts is not None
        assert after.routed_experts.dtype == np.uint16
        assert after.routed_experts.tolist() == before.routed_experts.tolist()


def test_256_experts_take_one_byte_each_in_the_file(tmp_path):
    write_rollout(tmp_path / "0.parquet", [routed(5, np.uint8, 255)], 0)
    [value] = pq.read_table(tmp_path / "0.parquet")["routed_experts"].to_pylist()
    assert value == bytes([255] * (8 * 6))


def test_few_rows_are_copied_at_a_time_where_each_has_much_routing(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_file, "BYTES_TOGETHER", 2 * 12 * 6)
    write_rollout(tmp_path / "0.parquet", [routed(9, np.uint8, 1) for _ in range(5)], 0)
    assert pq.ParquetFile(tmp_path / "0.parquet").num_row_groups == 3


def test_a_file_of_this_schema_from_another_writer_has_its_experts_in_uint16(tmp_path):
    """Without the metadata of the type."""
    row = {"prompt_tokens": [1, 2], "response_tokens": [3], "engine_log_probs": [-0.5], "segments": [],
           "routed_experts": np.arange(8, dtype=np.uint16).tobytes(), "weight_version": 3}  # fmt: skip
    others = {name: None for name in rollout_file.SCHEMA.names if name not in row}
    schema = rollout_file.SCHEMA.with_metadata({"iteration": "3"})
    pq.write_table(pa.Table.from_pylist([others | row], schema=schema), tmp_path / "3.parquet")
    [read], iteration = read_rollout(tmp_path / "3.parquet")
    assert iteration == 3 and read.routed_experts is not None
    assert read.routed_experts.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert read.segments[0].tokens == 1


def test_experts_of_a_part_of_the_tokens_count_as_none(tmp_path):
    odd = sample(0)
    odd.routed_experts = np.zeros((2, 4), np.uint8)
    write_rollout(tmp_path / "1.parquet", [odd], 1)
    assert read_rollout(tmp_path / "1.parquet")[0][0].routed_experts is None


def test_a_file_without_samples_is_refused(tmp_path):
    write_rollout(tmp_path / "0.parquet", [], 0)
    with pytest.raises(DataError, match="holds no samples"):
        read_rollout(tmp_path / "0.parquet")
    assert "teacher_log_probs" not in pq.read_schema(tmp_path / "0.parquet").names


# beside training


def test_the_file_is_written_while_the_driver_goes_on_and_is_there_after_the_wait(tmp_path, monkeypatch):
    may_write = threading.Event()

    def slowly(path: Path, samples: Any, iteration: int) -> None:
        assert may_write.wait(60)
        write_rollout(path, samples, iteration)

    monkeypatch.setattr(rollout_file, "write_rollout", slowly)
    writer = RolloutWriter()
    writer.begin(tmp_path / "0.parquet", [sample(0)], 0)
    assert not (tmp_path / "0.parquet").exists()
    may_write.set()
    writer.wait()
    assert read_rollout(tmp_path / "0.parquet")[1] == 0


def test_what_goes_wrong_in_the_thread_is_raised_by_the_wait_once(tmp_path):
    (tmp_path / "file").touch()
    writer = RolloutWriter()
    writer.begin(tmp_path / "file" / "0.parquet", [sample(0)], 0)
    with pytest.raises(OSError):
        writer.wait()
    writer.wait()


@pytest.mark.parametrize(
    ("path", "iterations", "message"),
    [
        ("absent", range(1), "no such rollout file or folder"),
        (
            ".",
            range(3),
            r"2\.parquet: no such file; .*set iterations=2, or give a folder that has them all",
        ),
        ("0.parquet", range(3), r"of iteration 0 alone, .* give the folder of all, or iterations=1"),
        ("1.parquet", range(1), "this is the rollout of iteration 1, not of 0"),
        ("other.parquet", range(1), "not a rollout file of this program"),
    ],
)
def test_rollouts_that_will_be_lacking_are_named_before_the_first_is_read(
    tmp_path, path, iterations, message
):
    for iteration in (0, 1):
        write_rollout(tmp_path / f"{iteration}.parquet", [sample(0)], iteration)
    (tmp_path / "other.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=message):
        check_rollouts(tmp_path / path, iterations)
    check_rollouts(tmp_path, range(2))
    check_rollouts(tmp_path / "1.parquet", range(1, 2))


def test_a_sources_name_is_read_back_and_a_file_without_that_column_has_one_source(tmp_path):
    write_rollout(tmp_path / "0.parquet", [sample(0, source="sums"), sample(2, source="words")], 0)
    assert [s.source for s in read_rollout(tmp_path / "0.parquet")[0]] == ["sums", "words"]
    table = pq.read_table(tmp_path / "0.parquet")
    pq.write_table(table.drop_columns(["source", "branch"]), tmp_path / "1.parquet")
    assert [s.source for s in read_rollout(tmp_path / "1.parquet")[0]] == ["", ""]
    assert list(grades(tmp_path / "0.parquet")) == ["sums 4", "words 4"]
    assert list(grades(tmp_path / "1.parquet")) == [4]
    shown = [read_prompts(tmp_path / f"{n}.parquet", [0], 2, limit=9)[0]["responses"] for n in (0, 1)]
    assert [responses[0]["branch"] for responses in shown] == [0, None]


def test_a_teachers_log_probabilities_are_read_back_bit_for_bit_and_lacking_ones_are_named(tmp_path):
    written = [sample(i, teacher_log_probs=-np.arange(1 + i, dtype=np.float32) / 7) for i in range(3)]
    write_rollout(tmp_path / "0.parquet", written, 0)
    read, _ = read_rollout(tmp_path / "0.parquet")
    for before, after in zip(written, read, strict=True):
        assert before.teacher_log_probs is not None and after.teacher_log_probs is not None
        assert after.teacher_log_probs.tolist() == before.teacher_log_probs.tolist()
    write_rollout(tmp_path / "1.parquet", [sample(0)], 1)
    assert read_rollout(tmp_path / "1.parquet")[0][0].teacher_log_probs is None
    check_rollouts(tmp_path, range(1), scored=True)
    with pytest.raises(DataError, match=r"1\.parquet: the rollout has no teacher's log-prob.*teacher=null"):
        check_rollouts(tmp_path, range(2), scored=True)
