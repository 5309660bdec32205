"""Workloads: what the flags mean, and that no workload outgrows its engine."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.bench.workloads import Workload, compose, parse_counts
from edgellm.errors import UsageError
from edgellm.executor.base import ExecutorInfo


def info(*, slots: int = 8, seq_len: int = 1024, tokens: int = 512) -> ExecutorInfo:
    return ExecutorInfo(
        name="fake",
        max_batch_size=slots,
        max_seq_len=seq_len,
        max_num_tokens=tokens,
        vocab_size=100,
        kv_bytes_per_token=1,
    )


def names(workloads: list[Workload]) -> list[tuple[str, int]]:
    return [(workload.name, workload.batch) for workload in workloads]


def test_rows_are_llama_benchs() -> None:
    workloads = compose(info(), prompts=[512], generates=[128], depths=[0, 512], batches=[1, 8])
    assert names(workloads) == [
        ("pp512", 1),
        ("pp512 @ d512", 1),
        ("tg128", 1),
        ("tg128", 8),
        ("tg128 @ d512", 1),
        ("tg128 @ d512", 8),
    ]


def test_tokens_are_counted_over_all_rows() -> None:
    assert Workload("tg", 128, 512, 8).total_tokens == 1024
    assert Workload("tg", 128, 512, 8).seq_len == 640


def test_zero_leaves_a_kind_out() -> None:
    workloads = compose(info(), prompts=[0], generates=[16], depths=[0], batches=[1])
    assert names(workloads) == [("tg16", 1)]
    with pytest.raises(UsageError, match=r"-p 0 -n 0"):
        compose(info(), prompts=[0], generates=[0])


@given(
    st.integers(1, 16),
    st.integers(1, 4096),
    st.integers(1, 1024),
)
def test_defaults_fit_every_engine(slots: int, seq_len: int, tokens: int) -> None:
    shape = info(slots=slots, seq_len=seq_len, tokens=tokens)
    workloads = compose(shape)
    assert {workload.kind for workload in workloads} == {"pp", "tg"}
    for workload in workloads:
        assert 1 <= workload.batch <= min(slots, tokens)
        assert workload.tokens >= 1
        assert workload.seq_len <= seq_len


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"batches": [1, 9]}, "-b 9: the engine advances at most 8 rows"),
        ({"prompts": [1025]}, "-p 1025: a slot holds 1024 tokens, so -p 1024 is the most"),
        ({"generates": [513], "depths": [0, 512]}, "so -n 512 is the most behind -d 512"),
        ({"depths": [1024]}, "-d 1023 is the most"),
    ],
)
def test_what_does_not_fit_names_the_flag_and_what_does(asked: dict[str, list[int]], says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        compose(info(), **asked)


def test_rows_are_also_bound_by_tokens_in_a_step() -> None:
    with pytest.raises(UsageError, match=r"at most 4 rows.*--max-num-tokens 4"):
        compose(info(tokens=4), batches=[5])


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=8))
def test_lists_of_numbers_keep_their_order_and_lose_repetitions(counts: list[int]) -> None:
    text = ",".join(str(count) for count in counts)
    assert parse_counts(text, "-p") == tuple(dict.fromkeys(counts))


@pytest.mark.parametrize("text", ["", "1,", "1,,2", "-1", "1.5", "four", "1_000", "٣", "0x10", "1;2"])
def test_what_is_no_number_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"-b {text}: ")):
        parse_counts(text, "-b")


def test_the_least_is_part_of_the_sentence() -> None:
    with pytest.raises(UsageError, match="whole number ≥ 1"):
        parse_counts("0", "-r", least=1)
