"""The plan computes the fewest tokens that are exact, in passes that fit. Pure Python: no model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.planning import MAX_SCORE_BYTES, MAX_TOKENS, Request, make_plan
from models import Capabilities, Shape, UnsupportedModelError

SMOLLM2 = Shape(30, 9, 3, 64, 576, 49152, 8192)


def plan(n_tokens=512, n_rows=32, positions=(511,), strategy="auto", packed="", **more):
    asked = Request(n_tokens, n_rows, positions, **more)
    return make_plan(SMOLLM2, Capabilities(packed=packed), asked, strategy)


@pytest.mark.parametrize(
    ("n_tokens", "n_rows", "positions", "strategy", "split", "computed"),
    [
        (512, 32, (511,), "packed", 511, 511 + 32),
        (512, 32, (100,), "packed", 100, 100 + 32 * 412),
        (512, 32, (511, 400), "packed", 400, 400 + 32 * 112),
        (512, 1, (511,), "packed", 511, 512),
        (2, 32, (1,), "packed", 1, 1 + 32),
        (512, 32, (0,), "batch", 0, 32 * 512),
        (1, 32, (0,), "batch", 0, 32),
        (100, 32, (10,), "batch", 0, 3200),  # a tenth shared is not worth it
        (100, 32, (11,), "packed", 11, 11 + 32 * 89),
    ],
)
def test_auto(n_tokens, n_rows, positions, strategy, split, computed):
    made = plan(n_tokens, n_rows, positions)
    assert (made.strategy, made.split, made.n_computed) == (strategy, split, computed)
    assert made.n_naive == n_rows * n_tokens


def test_auto_where_rows_cannot_be_packed():
    """Expanded computes the same tokens; the reason is passed on."""
    made = plan(packed="it has sliding windows")
    assert (made.strategy, made.split, made.n_computed) == ("expanded", 511, 543)
    assert "it has sliding windows" in made.reason
    assert plan(positions=(0,), packed="it has sliding windows").strategy == "batch"


@pytest.mark.parametrize(
    ("strategy", "split", "computed"),
    [("packed", 400, 400 + 32 * 112), ("expanded", 400, 400 + 32 * 112), ("batch", 0, 16384), ("naive", 0, 16384)],
)
def test_asked_for(strategy, split, computed):
    made = plan(positions=(400,), strategy=strategy)
    assert (made.strategy, made.split, made.n_computed, made.reason) == (strategy, split, computed, "asked for")


@pytest.mark.parametrize(("ready", "computed"), [(0, 543), (300, 243), (511, 32)])
def test_tokens_at_hand_are_not_computed_again(ready, computed):
    assert plan(n_ready=ready).n_computed == computed
    assert plan(n_ready=ready, strategy="expanded").n_computed == computed
    assert plan(n_ready=ready, strategy="batch").n_computed == 16384


def test_tokens_at_hand_behind_the_first_position_do_not_count():
    assert plan(positions=(100,), n_ready=511).n_computed == 32 * 412


@given(
    n_tokens=st.integers(1, 8192),
    n_rows=st.integers(1, 500),
    first=st.floats(0, 1, exclude_max=True),
    strategy=st.sampled_from(["auto", "packed", "expanded", "batch", "naive"]),
    refused=st.sampled_from(["", "why"]),
)
def test_passes_fit(n_tokens, n_rows, first, strategy, refused):
    """Whatever is asked: at least a row a pass, no more than there are, and no more than memory allows."""
    if strategy == "packed" and refused:
        return
    made = plan(n_tokens, n_rows, (int(first * n_tokens),), strategy=strategy, packed=refused)
    assert 1 <= made.rows_per_pass <= n_rows
    assert 0 <= made.split < n_tokens
    assert 0 < made.n_computed <= made.n_naive
    assert made.strategy != "auto"
    if made.rows_per_pass > 1:
        tail = n_tokens - made.split
        assert made.rows_per_pass * tail <= MAX_TOKENS
        if made.strategy == "packed":
            assert made.rows_per_pass * 4 * SMOLLM2.n_heads * tail * n_tokens <= MAX_SCORE_BYTES


def test_what_a_model_cannot_do_is_passed_over():
    """The next way that is exact, in words; longer prompts than the model's tables allow are batched."""
    asked = Request(512, 32, (511,))
    for can, strategy in (
        (Capabilities(packed="a"), "expanded"),
        (Capabilities(packed="a", expanded="b"), "batch"),
        (Capabilities(packed="a", expanded="b", batch="c"), "naive"),
        (Capabilities(longest=511, longer="a"), "batch"),
        (Capabilities(longest=512, longer="a"), "packed"),
    ):
        made = make_plan(SMOLLM2, can, asked)
        assert made.strategy == strategy
        assert all(why in made.reason for why in (can.packed, can.batch)), made.reason
    with pytest.raises(UnsupportedModelError, match="'layered' is not exact here: a"):
        make_plan(SMOLLM2, Capabilities(packed="a"), asked, "layered")
    with pytest.raises(UnsupportedModelError, match="'batch' is not exact here: rows mix"):
        make_plan(SMOLLM2, Capabilities(batch="rows mix"), asked, "batch")


def test_naive_runs_one_row_a_pass():
    assert plan(strategy="naive").rows_per_pass == 1


def test_what_a_plan_says():
    assert str(plan()) == (
        "packed: 32 rows of 512 tokens, 511 of them shared; 543 tokens computed in 1 pass (naive: 16384); "
        "rows differ only from token 511 on"
    )
    assert str(plan(strategy="naive")) == (
        "naive: 32 rows of 512 tokens, 0 of them shared; 16384 tokens computed in 32 passes (naive: 16384); asked for"
    )
    assert "in 4 passes" in str(plan(strategy="batch"))
    assert "rows share only 0 of 512 tokens" in str(plan(positions=(0,)))


def test_refused():
    with pytest.raises(UnsupportedModelError, match="not exact here: it slides"):
        plan(strategy="packed", packed="it slides")
    with pytest.raises(ValueError, match="rows must be a positive integer, got 0"):
        plan(n_rows=0)
