"""Prefixes of a pool have the same bits in whatever order they are asked for, and keep within a budget of memory."""

import pytest
import torch

import engine
from models.calls import Passing
from tests.conftest import KINDS

LENGTHS = (9, 5, 12, 3, 1, 7, 25, 2, 2, 14)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Groups of 20 tokens, so that ten short prompts make several."""
    monkeypatch.setattr("engine.core.prefix.GROUP_TOKENS", 20)


@pytest.fixture
def prompts(random):
    return [torch.randint(97, (n,), generator=random) for n in LENGTHS]


def bits(prefix):
    return [*(k.clone() for k in prefix.cache.keys), *(v.clone() for v in prefix.cache.values)]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def count_runs(model):
    runs = []
    return runs, model.hf.register_forward_pre_hook(Passing(lambda *_: runs.append(1)))


@pytest.mark.parametrize("family", KINDS)
def test_prefixes_are_those_of_prefill(tiny, prompts, family):
    model = tiny(family)
    pool = engine.PrefixPool(model, prompts)
    assert len(pool) == len(prompts)
    for index, prompt in enumerate(prompts):
        got, want = pool[index], engine.prefill(model, prompt)
        assert torch.equal(got.tokens, prompt)
        assert len(got.cache) == len(want.cache) == len(prompt) - 1
        assert all((a - b).abs().max() <= 1e-5 for a, b in zip(bits(got), bits(want), strict=True))


@pytest.mark.parametrize("family", KINDS)
def test_same_bits_in_any_order(tiny, prompts, family):
    """And again after being dropped: a budget of one byte keeps one group at a time."""
    model = tiny(family)
    pool = engine.PrefixPool(model, prompts)
    want = [bits(pool[i]) for i in range(len(prompts))]
    for budget in (2**30, 1):
        for order in (range(9, -1, -1), (4, 9, 0, 6, 4, 2, 8, 1, 9, 3, 5, 7, 0)):
            other = engine.PrefixPool(model, prompts, budget=budget)
            assert all(same(bits(other[i]), want[i]) for i in order)


def test_stays_within_the_budget(model, prompts):
    """What was unused for longest goes first; one group stays, whatever its size."""
    whole = engine.PrefixPool(model, prompts)
    for i in range(len(prompts)):
        whole[i]
    assert whole.nbytes == sum(whole[i].nbytes for i in range(len(prompts)))
    for budget in (whole.nbytes, whole.nbytes // 2, whole.nbytes // 3, 1):
        pool = engine.PrefixPool(model, prompts, budget=budget)
        for i in (*range(10), 3, 0, 9):
            pool[i]
            assert pool.nbytes <= budget or len(pool._ready) == 1
    assert len(pool._ready) == 1  # of the last budget


def test_keeps_what_was_used_last(model, prompts):
    whole = engine.PrefixPool(model, prompts)
    sizes = {}
    for i in range(len(prompts)):
        sizes[whole._group_of[i]] = sizes.get(whole._group_of[i], 0) + whole[i].nbytes
    pool = engine.PrefixPool(model, prompts, budget=sizes[0] + sizes[1])
    first, second, third = (whole._groups[g][0] for g in (0, 1, 2))
    assert sizes[2] <= sizes[1]
    for i in (first, second, first, third):
        pool[i]
    runs, handle = count_runs(model)
    try:
        pool[first]
        assert not runs
        pool[second]
        assert len(runs) == 1
    finally:
        handle.remove()


@pytest.mark.parametrize("family", KINDS)
def test_nothing_is_computed_twice(tiny, prompts, family):
    model = tiny(family)
    runs, handle = count_runs(model)
    try:
        pool = engine.PrefixPool(model, prompts)
        assert not runs  # computed when first needed
        for i in range(len(prompts)):
            pool[i]
        first = len(runs)
        for i in range(len(prompts)):
            pool[i]
    finally:
        handle.remove()
    assert len(runs) == first
    assert 0 < first < len(prompts)


def test_prompts_without_a_prefix(model):
    """A prompt of one token has nothing to share, and costs nothing."""
    runs, handle = count_runs(model)
    try:
        pool = engine.PrefixPool(model, [[5], [6]])
        assert len(pool[0].cache) == len(pool[1].cache) == pool.nbytes == 0
    finally:
        handle.remove()
    assert not runs


def test_patched_from_the_pool(tiny, draw, prompts):
    model = tiny("llama")
    heads, values = draw(model)
    pool = engine.PrefixPool(model, prompts)
    got = engine.patch(model, [pool[i] for i in range(len(prompts))], heads=heads, values=values)
    assert (got - engine.naive.patch(model, prompts, heads=heads, values=values)).abs().max() <= 1e-5


@pytest.mark.parametrize(("positions", "first"), [(-1, 9), (0, 0), (4, 4), ([-1, 3], 3), ([2, -9], 1)])
def test_prefill_reaches_to_the_first_position(model, positions, first):
    prompt = list(range(10))
    prefix = engine.prefill(model, prompt, positions=positions)
    assert len(prefix.cache) == first
    assert prefix.tokens.tolist() == prompt
    assert prefix.nbytes == first * 3 * 2 * 2 * 8 * 4  # layers, keys and values, kv heads, head_dim, float32
