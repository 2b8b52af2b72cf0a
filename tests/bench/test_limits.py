"""Limits by hand on one shape: 3 layers, 6 heads of 8 (2 key/value heads), width 48, MLP 80, vocabulary 97, float32."""

import pytest
import torch

from bench.cases import CASES, depth
from bench.limits import Rates, Sizes, Work, floor
from bench.shapes import make

# One block: q and o 48 x 48, k and v 48 x 16, three MLP matrices 48 x 80.
BLOCKS = 3 * (2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 80)
VOCABULARY = 48 * 97


@pytest.fixture(scope="module")
def sizes():
    return Sizes.of(make("tiny"))


def test_weights(sizes):
    assert (sizes.blocks, sizes.vocabulary) == (BLOCKS, VOCABULARY) == (52992, 4656)


def test_prefill(sizes):
    # Ten tokens see 1 + 2 + ... + 10 = 55; scores and values: two products of 48 numbers a layer each.
    # Two of three blocks: of the last, the prompt's keys and values are all that rows need.
    assert sizes.prefill(10).flops == 2 * (2 * 10 * BLOCKS // 3 + 55 * 2 * (2 * 48))


def test_row_step(sizes):
    work = sizes.row_step(4, 10)
    assert work.flops == 2 * 4 * (BLOCKS + VOCABULARY) + 3 * 4 * 10 * 2 * (2 * 48)
    assert work.bytes == 4 * (BLOCKS + VOCABULARY + 3 * 2 * 16 * 9)
    # Rows that come in after the first of three blocks.
    late = sizes.row_step(4, 10, depth=2 / 3)
    assert late.flops == pytest.approx(2 * 4 * (BLOCKS * 2 / 3 + VOCABULARY) + 2 * 4 * 10 * 2 * (2 * 48))
    assert late.bytes == work.bytes


def test_depth():
    heads = torch.zeros(4, 3, 6, dtype=torch.bool)
    heads[0, 0, 1] = heads[1, 1, 2] = heads[2, 2, 3] = heads[2, 1, 0] = True
    assert depth(heads) == pytest.approx((3 + 2 + 2 + 0) / 12)


def test_the_larger_of_the_two_limits_counts():
    assert Work(100, 10).seconds(Rates(flops=10, bandwidth=10)) == 10
    assert Work(100, 1000).seconds(Rates(flops=10, bandwidth=10)) == 100
    assert floor([Work(100, 10), Work(100, 1000)], Rates(10, 10)) == 110


def test_one_pass_reads_the_weights_once(sizes):
    both = sizes.fresh(4, 10)
    assert both.flops == sizes.prefill(9).flops + sizes.row_step(4, 10).flops
    assert both.bytes == sizes.row_step(4, 10).bytes


def test_each_case_needs_what_it_computes(sizes):
    rates = Rates(1, float("inf"))
    heads = torch.ones(4, 3, 6, dtype=torch.bool)
    need = {name: floor(case.passes(sizes, heads, 10), rates) for name, case in CASES.items()}
    assert need["rollouts"] == need["sweep"] == need["reused"] + sizes.prefill(9).flops
    assert need["means"] == 4 * sizes.prefill(10).flops
    assert need["search"] == need["reused"]
    steps = sum(sizes.row_step(4, 10 + n).flops for n in range(1, 4))
    assert need["generate"] == need["rollouts"] + steps
