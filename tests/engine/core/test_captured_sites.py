"""Activations captured at every site equal what plain hooks see: every families, also of patched rows."""

import pytest
import torch
from torch.nn.functional import pad

import engine
from tests import plain, sites
from tests.plain import LAYOUTS
from tests.sites import Out, draw, every, prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of the libraries, on families they no longer care for


@torch.no_grad()
def looked_at(one, prompts, at, wanted, changes=()):
    """By site, [prompts, positions, layers, units, width], in float64; and what rounding makes of it."""
    found = []
    for hf in (one.double, one.same):
        by_prompt = [plain.activations(hf, one.name, ids, wanted, changes) for ids in prompts]
        each = {s: [x[s].transpose(0, 1)[at].double() for x in by_prompt] for s in wanted}
        most = {s: max(x.shape[-1] for x in each[s]) for s in wanted}
        found.append({s: torch.stack([pad(x, (0, most[s] - x.shape[-1])) for x in each[s]]) for s in wanted})
    return found


def alike(got, want, own):
    assert got.shape == want.shape
    assert torch.equal(got.isfinite(), want.isfinite())
    seen = want.isfinite()
    rounding = (want[seen] - own[seen]).abs().max()
    assert (got.double()[seen] - want[seen]).abs().max() <= sites.LIMIT + 2 * rounding


@pytest.mark.parametrize("name", every("llama", "gemma2", "bloom"))
def test_captured_at_every_site(families, random, name):
    """All at once, and one by one; at one position and at several."""
    one = families(name)
    prompts = [prompt(random, 9) for _ in range(3)]
    want, own = looked_at(one, prompts, [-1, 4, 0], one.sites)
    got = engine.capture(one.model, prompts, [-1, 4, 0], sites=tuple(one.sites))
    assert set(got) == set(one.sites)
    for site in one.sites:
        alike(got[site], want[site], own[site])
        alone = engine.capture(one.model, prompts, 4, sites=(site,))
        assert set(alone) == {site}
        alike(alone[site], want[site][:, 1], own[site][:, 1])
        alike(engine.capture(one.model, prompts, [4], sites=site), want[site][:, 1:2], own[site][:, 1:2])
    alike(engine.capture(one.model, prompts, [-1, 4, 0]), want["z"], own["z"])


@pytest.mark.parametrize("name", every("llama", "gpt2", "bloom"))
def test_captured_of_prompts_of_several_lengths(families, random, name):
    """Attention is padded with zeros, to the longest."""
    one = families(name)
    prompts = [prompt(random, n) for n in (3, 11, 6, 3)]
    some = tuple(one.sites)
    want, own = looked_at(one, prompts, [-1, 0], some)
    got = engine.capture(one.model, prompts, [-1, 0], sites=some)
    for site in some:
        alike(got[site], want[site], own[site])


@pytest.mark.parametrize("name", every("llama", "gemma2", "bloom"))
def test_captured_under_patches(families, random, name):
    """What is there with the patches, row by row; at their own sites what they put there."""
    one = families(name)
    prompts = [prompt(random, 9) for _ in range(2)]
    cases = [
        draw(one, site, random, n_tokens=9, rows=rows, positions=positions, mode=mode)
        for site, rows, positions, mode in (
            ("resid_pre", 3, 2, "add"),
            ("z", 1, [-3, -1], "replace"),
            ("mlp_out", 3, -1, "scale"),
        )
    ]
    if LAYOUTS[name].interface:
        cases += [draw(one, "k", random, n_tokens=9, rows=1, positions=3)]
        cases += [Out(None, [[0], [1], [2, 3]], 4, one.sizes("z", 1)[:2])]
    changes = [[change for case in cases for change in case.of(row, 9)] for row in range(3)]
    each = [looked_at(one, prompts, [-1, 4, 2], one.sites, some) for some in changes]
    want, own = ({site: torch.stack([row[i][site] for row in each], 1) for site in one.sites} for i in (0, 1))
    records = [case.record for case in cases]
    got = engine.capture(one.model, prompts, [-1, 4, 2], sites=tuple(one.sites), patches=records)
    for site in one.sites:
        alike(got[site], want[site], own[site])  # [prompts, rows, positions, layers, units, width]
    alike(engine.capture(one.model, prompts, [-1, 4, 2], patches=records), want["z"], own["z"])
    alike(engine.capture(one.model, prompts, 4, patches=records), want["z"][:, :, 1], own["z"][:, :, 1])


def test_means_of_sites(families, random):
    one = families("llama")
    prompts = [prompt(random, n) for n in (4, 9, 5)]
    some = ("resid_mid", "q", "mlp_act")
    want, own = looked_at(one, prompts, [-1], some)
    got = engine.mean_activations(one.model, prompts, sites=some, progress=False)
    assert set(got) == set(some)
    for site in some:
        alike(got[site], want[site][:, 0].mean(0), own[site][:, 0].mean(0))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_captured_activation_patched_in_is_that_of_the_other_prompt(families, random, name):
    """resid_post of the last token at a layer decides, if all that it sees later is the same."""
    one = families(name)
    a, b = prompt(random, 8), prompt(random, 8)
    got = engine.capture(one.model, [a], list(range(8)), sites=("resid_pre",))["resid_pre"]  # [1, P, L, 1, W]
    patched = engine.patch(one.model, b, engine.Patch("resid_pre", [1], got, list(range(8))))
    torch.testing.assert_close(patched, engine.patch(one.model, a), atol=2e-5, rtol=0)
