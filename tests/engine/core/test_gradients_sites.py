"""Gradients of a loss with respect to the values of patches, against differences of plain forwards."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import engine
from tests import plain, sites
from tests.conftest import quick
from tests.sites import Case, draw, prompt

STRATEGIES = ("auto", "packed", "layered", "expanded", "batch", "naive")
TARGET = 11
STEP = 1e-5
KINDS = [
    ("resid_post", "add"), ("resid_post", "replace"), ("resid_pre", "scale"), ("resid_mid", "add"),
    ("attn_out", "replace"), ("mlp_out", "replace"), ("mlp_act", "scale"), ("q", "replace"), ("k", "add"),
    ("v", "scale"), ("z", "replace"), ("scores", "add"), ("pattern", "replace"), ("pattern", "scale"),
]  # fmt: skip


def loss(logits):
    """Cross-entropy of one token, other weights for other rows."""
    each = cross_entropy(logits, torch.full((len(logits),), TARGET), reduction="none")
    return (each * torch.arange(1, len(logits) + 1)).sum()


def as_double(case):
    case.values = case.values.double()
    return case


def by_differences(one, ids, cases, rows, index, directions):
    """Slopes of the loss along each direction of the values of one case, by plain forwards."""
    found, here = [], cases[index].values
    for direction in directions:
        ends = []
        for sign in (1, -1):
            cases[index].values = here + sign * STEP * direction
            ends.append(loss(sites.oracle(one.double, one.name, ids, cases, rows)))
        found.append((ends[0] - ends[1]) / (2 * STEP))
    cases[index].values = here
    return torch.stack(found)


def directions(case, random, n=4):
    """Random ones, of patched units alone and of all; a pattern's rows keep their sums."""
    drawn = torch.randn(n, *case.values.shape, generator=random, dtype=torch.float64)
    if case.site == "pattern":
        visible = case.values != 0
        drawn = drawn.masked_fill(~visible, 0)
        drawn = (drawn - drawn.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)).masked_fill(~visible, 0)
    return drawn


def graded(call, case):
    """The gradient of the loss with respect to the values of a case."""
    leaf = case.values.clone().requires_grad_()
    values = leaf[0, 0] if leaf.shape[1] == 1 and len(leaf) == 1 else leaf[:, 0] if leaf.shape[1] == 1 else leaf
    record = engine.Patch(case.site, case.units, values, case.positions, case.mode)
    loss(call(record)).backward()
    assert leaf.grad is not None
    return leaf.grad


def agrees(grad, slopes, moved):
    along = (moved * grad).flatten(1).sum(1)
    assert slopes.abs().max() > 1e-3  # else there is nothing to see
    torch.testing.assert_close(along, slopes, atol=1e-6 * slopes.abs().max().item(), rtol=1e-6)


@pytest.mark.parametrize("name", quick(("llama", "gpt2"), "llama"))
@pytest.mark.parametrize(("site", "mode"), KINDS)
def test_slopes(families, random, name, site, mode):
    """Shared values, and a set a row at two positions."""
    one, ids = families(name, torch.float64), prompt(random, 9)
    for options in (dict(positions=-1), dict(positions=[-3, -1], per_row=True, per_position=True)):
        case = as_double(draw(one, site, random, n_tokens=9, rows=3, mode=mode, **options))
        moved = directions(case, random)
        slopes = by_differences(one, ids, [case], 3, 0, moved)
        for strategy in STRATEGIES:
            grad = graded(lambda record, way=strategy: engine.patch(one.model, ids, record, strategy=way), case)
            agrees(grad, slopes, moved)
        agrees(graded(lambda record: engine.naive.patch(one.model, ids, record), case), slopes, moved)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("strategy", ["auto", "packed", "batch", "naive"])
def test_of_every_patch_beside_others(families, random, name, strategy):
    """Several at once, some at one site, one a knockout and one an edit without values."""
    one, ids = families(name, torch.float64), prompt(random, 9)
    cases = [
        as_double(draw(one, site, random, n_tokens=9, rows=rows, positions=positions, mode=mode))
        for site, rows, positions, mode in (
            ("resid_post", 1, [-2, -1], "add"),
            ("z", 3, -1, "scale"),
            ("z", 3, [-2, -1], "add"),
            ("mlp_out", 3, -1, "replace"),
            ("scores", 1, -1, "add"),
        )
    ]
    knocked = sites.Out(draw(one, "scores", random, n_tokens=9, rows=3).units, [[0], [1], [2]], -1)
    edited = sites.Function("mlp_act", [0, 2], lambda layer, x: x * 0.5, -1)
    leaves = [case.values.clone().requires_grad_() for case in cases]
    records = [
        engine.Patch(case.site, case.units, leaf[0, 0], case.positions, case.mode)
        for case, leaf in zip(cases, leaves, strict=True)
    ]
    logits = engine.patch(one.model, ids, [*records, knocked.record], strategy=strategy)
    loss(logits).backward()
    for i, leaf in enumerate(leaves):
        moved = directions(cases[i], random)
        agrees(leaf.grad, by_differences(one, ids, [*cases, knocked], 3, i, moved), moved)
    logits = engine.patch(one.model, ids, [case.record for case in cases] + [edited.record], strategy=strategy)
    torch.testing.assert_close(logits, sites.oracle(one.double, name, ids, [*cases, edited], 3), atol=1e-10, rtol=0)
    assert not logits.requires_grad


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_of_several_prompts(families, random, name):
    one, prompts = families(name, torch.float64), [prompt(random, n) for n in (5, 9, 5)]
    case = as_double(draw(one, "resid_mid", random, n_tokens=5, rows=3, positions=[-2, -1]))
    moved = directions(case, random)
    slopes = sum(by_differences(one, ids, [case], 3, 0, moved) for ids in prompts)
    for strategy in ("auto", "packed", "batch", "naive"):
        leaf = case.values.clone().requires_grad_()
        record = engine.Patch(case.site, case.units, leaf[0, 0], case.positions, case.mode)
        got = engine.patch(one.model, prompts, record, strategy=strategy)
        sum(loss(rows) for rows in got).backward()
        agrees(leaf.grad, slopes, moved)


def test_what_is_not_patched_has_none(families, random):
    """Numbers of units and layers that no row patches; and each row's own values of rows that do not."""
    one, ids = families("llama", torch.float64), prompt(random, 9)
    for site in ("resid_post", "q", "mlp_act", "scores"):
        case = as_double(draw(one, site, random, n_tokens=9, rows=4, per_row=True, mode="add"))
        grad = graded(lambda record: engine.patch(one.model, ids, record), case)  # [4, 1, L, U, W]
        assert not grad[~case.units[:, None]].any()
        assert grad[case.units[:, None]].any()


def test_vectors_and_numbers(families, random):
    """A vector for all layers: the sum of the gradients of each."""
    one, ids = families("llama", torch.float64), prompt(random, 9)
    units = torch.tensor([[True, False, True]])
    vector = torch.randn(48, generator=random, dtype=torch.float64, requires_grad=True)
    loss(engine.patch(one.model, ids, engine.Patch("resid_post", units, vector, mode="add"))).backward()
    case = Case("resid_post", units[..., None], vector.detach().expand(1, 1, 3, 1, 48).clone(), -1, "add")
    moved = torch.randn(4, 48, generator=random, dtype=torch.float64)
    slopes = by_differences(one, ids, [case], 1, 0, moved[:, None, None, None, None].expand(4, 1, 1, 3, 1, 48))
    agrees(vector.grad, slopes, moved)


def test_plain_gradients_agree(families, random):
    """The differences themselves, against what torch makes of the plain forward."""
    one, ids = families("gpt2", torch.float64), prompt(random, 9)
    case = as_double(draw(one, "resid_mid", random, n_tokens=9, rows=2))
    moved = directions(case, random)
    leaf = case.values.clone().requires_grad_()
    again = Case(case.site, case.units, leaf, case.positions, case.mode)
    logits = torch.stack([plain.logits(one.double, "gpt2", ids, again.of(row, 9)) for row in range(2)])
    loss(logits).backward()
    agrees(leaf.grad, by_differences(one, ids, [case], 2, 0, moved), moved)
