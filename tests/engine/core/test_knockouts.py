"""Knockouts, scores and edits equal plain hooks: what a token does not see, and functions of activations."""

import pytest
import torch

import engine
import models
from tests import plain
from tests.plain import LAYOUTS
from tests.sites import STRATEGIES, Case, Function, Out, Wanted, draw, every, exact, halved, having, prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of the libraries, on families they no longer care for


@pytest.mark.parametrize("name", every("llama", "gemma2", "opt", "gpt_oss"))
def test_knockouts(families, random, name):
    one, ids = families(name), prompt(random)
    if not LAYOUTS[name].interface:
        with pytest.raises(models.UnsupportedModelError):
            engine.patch(one.model, ids, engine.Knockout(None, [0]))
        return
    sizes = one.sizes("scores", 1)[:2]
    heads = draw(one, "scores", random, n_tokens=len(ids)).units
    cases = [
        (Out(None, [-4], -1, sizes), 1),
        (Out(None, [0, 2], [-1, -3], sizes), 1),
        (Out(heads, [5, 0, -2], -1), 4),
        (Out(heads, [[0], [-5], [3, 4, 5], [1]], [-3, -1]), 4),
        (Out(None, [[6], [7, 8]], [9, 10], sizes), 2),
        (Out(None, [list(range(11)), [-2]], -1, sizes), 2),  # only itself is left
    ]
    unpatched = engine.patch(one.model, ids)
    for case, rows in cases:
        exact(one, ids, [case], rows=rows)
        assert (engine.patch(one.model, ids, case.record)[0] - unpatched).abs().max() > 1e-4
    got = engine.patch(one.model, ids, engine.Knockout([(1, 0), (2, 3)], [4, 5]))
    mask = torch.zeros(1, *sizes, dtype=torch.bool)
    mask[0, 1, 0] = mask[0, 2, 3] = True
    Wanted(one, ids, [Out(mask, [4, 5], -1)], 1).near(got)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_knockouts_beside_patches(families, random, name):
    """Scores added to, and those of a key taken out, before or after; other sites; heads."""
    one, ids = families(name), prompt(random)
    n, sizes = len(ids), one.sizes("scores", 1)[:2]
    out = Out(draw(one, "scores", random, n_tokens=n).units, [[0], [2], [3], [4]], [-2, -1])
    added = draw(one, "scores", random, n_tokens=n, mode="add", positions=-1)
    others = [draw(one, site, random, n_tokens=n, rows=1) for site in ("resid_post", "k", "z")]
    exact(one, ids, [out, added])
    exact(one, ids, [added, out])
    exact(one, ids, [*others, out])
    exact(one, ids, [Out(None, [1, 6], -1, sizes), draw(one, "pattern", random, n_tokens=n), *others])
    exact(one, ids, [Out(None, [1], -1, sizes), Out(None, [[2], [3], [1, 5], [0]], -1, sizes)])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_what_is_not_seen_stays_so(families, random, name):
    """Numbers of scores for tokens after the token itself, or beyond its window, do nothing."""
    one, ids = families(name), prompt(random, 15)
    mask = torch.ones(1, *one.sizes("scores", 1)[:2], dtype=torch.bool)
    values = torch.randn(1, 1, *one.sizes("scores", 15), generator=random)
    unseen = torch.arange(15) > 10
    got = []
    for noise in (0.0, 9.0):
        case = Case("scores", mask, values + noise * unseen, [10, -2], "replace")
        exact(one, ids, [case], rows=1)
        got.append(engine.patch(one.model, ids[:11], engine.Patch("scores", mask, case.values[0, 0, ..., :11])))
    torch.testing.assert_close(*got, atol=1e-5, rtol=0)
    uniform = Case("scores", mask, 0.0, [4, -1], "scale")
    exact(one, ids, [uniform], rows=1)


def folded(layer, x):
    """No site's own; of tokens and rows one by one."""
    return x * (0.5 + 0.1 * layer) + 0.1 * x.square().clamp(max=4).mean(-1, keepdim=True)


@pytest.mark.parametrize(("name", "site"), having("llama"))
def test_edits(families, random, name, site):
    one, ids = families(name), prompt(random)
    function = halved if site in ("scores", "pattern") else folded
    for layers, positions in (([0, 2], -1), ([1], [-4, -1]), ([2, 1, 0], 0)):
        exact(one, ids, [Function(site, layers, function, positions)], rows=1)
    beside = [draw(one, other, random, n_tokens=len(ids)) for other in ("z", site)]
    exact(one, ids, [beside[0], Function(site, [1, 2], function, [-2, -1]), beside[1]])
    exact(one, ids, [beside[0], Function(site, [1, 2], function, [-2, -1], rows=4), beside[1]])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_an_edit_is_given(families, random, strategy):
    """Of its layers alone, and of every row, its positions with what comes before: a tensor that it may write to."""
    one, ids = families("llama"), prompt(random)
    seen = {}

    def write(layer, x):
        assert x.ndim == 4
        assert x.shape[2:] == (80, 1)
        seen.setdefault(layer, []).extend(x.flatten(0, 1).squeeze(-1).clone())
        x[:] = 0
        return x

    q = draw(one, "q", random, n_tokens=len(ids), positions=2)
    asked = [q.record, engine.Edit("mlp_act", [0, 2], write, rows=4, positions=[-1, 3])]
    got = engine.patch(one.model, ids, asked, strategy=strategy)
    nothing = Case("mlp_act", torch.tensor([1, 0, 1]).bool()[None, :, None].expand(1, 3, 80), 0.0, [-1, 3], "scale")
    Wanted(one, ids, [q, nothing], 4).near(got)
    assert set(seen) == {0, 2}
    for row in range(4):
        changes = q.of(row, len(ids)) + nothing.of(row, len(ids))[1:]  # but the first, which is looked for here
        with torch.no_grad():
            x = plain.activations(one.same, "llama", ids, ["mlp_act"], changes)["mlp_act"]
        for token in (-1, 3):
            assert min((x[0, token, :, 0] - given).abs().max() for given in seen[0]) < 1e-5
