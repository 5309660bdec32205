"""Plans grow with every size, and the frontier is exactly where they stop fitting."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from footprints import footprint, footprints, shapes
from hypothesis import given
from hypothesis import strategies as st

from edgellm.memory.cpu import CpuFootprint
from edgellm.memory.plan import Line, Plan, Shape, frontier, make_plan, with_tokens

SIZES = ("max_batch_size", "max_seq_len", "max_num_tokens")


@given(footprints, shapes, st.sampled_from(SIZES), st.integers(1, 1000))
def test_no_size_makes_it_smaller(model: CpuFootprint, shape: Shape, size: str, more: int) -> None:
    larger = replace(shape, **{size: getattr(shape, size) + more})
    before, after = make_plan(model, shape), make_plan(model, larger)
    assert after.total >= before.total
    assert after.at_ready >= before.at_ready
    for one, other in zip(before.lines, after.lines, strict=True):
        assert one.name == other.name
        assert one.kind == "transient" or other.bytes >= one.bytes


@given(footprints, shapes)
def test_more_slots_and_longer_ones_do_cost(model: CpuFootprint, shape: Shape) -> None:
    total = make_plan(model, shape).at_ready
    for size in ("max_batch_size", "max_seq_len"):
        assert make_plan(model, replace(shape, **{size: getattr(shape, size) + 1})).at_ready > total


@given(footprints, st.integers(50 << 20, 64 << 30), st.integers(2, 20_000), st.integers(1, 2048))
def test_the_frontier_fits_and_one_token_more_does_not(
    model: CpuFootprint, budget: int, longest: int, tokens: int
) -> None:
    found = frontier(model, budget=budget, longest=longest, max_num_tokens=tokens)
    for shape in found:
        assert make_plan(model, shape, budget).fits
        assert 2 <= shape.max_seq_len <= longest
        assert shape.max_batch_size <= shape.max_num_tokens <= shape.max_batch_size * shape.max_seq_len
        if shape.max_seq_len < longest:
            longer = with_tokens(Shape(shape.max_batch_size, shape.max_seq_len + 1, tokens))
            assert not make_plan(model, longer, budget).fits
    lengths = [shape.max_seq_len for shape in found]
    assert lengths == sorted(lengths, reverse=True)
    batches = [1 << n for n in range(9)]
    assert [shape.max_batch_size for shape in found] == batches[: len(found)]
    for batch in batches[len(found) :]:
        assert not make_plan(model, with_tokens(Shape(batch, 2, tokens)), budget).fits


def test_sums() -> None:
    lines = (
        Line("process", 100, ""),
        Line("embedding", 10, "", "mapped"),
        Line("loading", 5, "", "transient"),
        Line("requests", 7, "", "serving"),
        Line("weights", 1000, "", "device"),
        Line("results", 1, "", "pinned"),
    )
    plan = Plan(Shape(1, 2, 1), lines, 1200)
    assert (plan.total, plan.at_ready, plan.headroom, plan.fits) == (1123, 1101, 77, True)
    assert not replace(plan, budget=1122).fits
    assert replace(plan, budget=None).fits
    assert replace(plan, budget=None).headroom is None


def test_smollm2_adds_up_as_it_does_by_hand() -> None:
    """Known numbers: 106,168,320 weights in linears, 28,311,552 in the head, groups of 32."""
    lines = {line.name: line for line in make_plan(footprint(), Shape(4, 1024, 256)).lines}
    linears, head = 106_168_320, 28_311_552
    assert lines["weights 4-bit with offsets"].bytes == linears // 2 + 3 * 4 * linears // 32
    assert lines["weights 8-bit"].bytes == head + 2 * 4 * head // 32
    assert lines["kv_cache"].bytes == 4 * 1024 * 46080 + 3 * 1024 * 64 * 4
    assert lines["embedding"].bytes == head + 4 * head // 32
    assert lines["embedding"].kind == "mapped"
    halved = {line.name: line for line in make_plan(footprint(kv_cache="fp16"), Shape(4, 1024, 256)).lines}
    assert halved["kv_cache"].bytes * 2 == lines["kv_cache"].bytes


def test_formulas_give_their_own_figures() -> None:
    """What a person reads, computed as a person would, is what the line says."""
    for model in (footprint(), footprint(compute="fp32", threads=2), footprint(kv_cache="fp16")):
        for line in make_plan(model, Shape(4, 1024, 256)).lines:
            if line.kind == "transient":
                continue
            assert _value(line.formula) == pytest.approx(line.bytes, rel=1e-6), line.formula


def _value(formula: str) -> float:
    """The arithmetic in a formula: words mean nothing, `n bit` is n / 8 bytes."""
    text = formula.replace(",", "").replace("×", "*")
    text = re.sub(r"(\d+) bit", r"\1 / 8", text)
    text = re.sub(r"\(\s*\)", "", re.sub(r"[A-Za-z]+", "", text))
    assert re.fullmatch(r"[\d\s*+/.()]+", text), text
    return float(eval(text))
