"""Sites by TransformerLens and nnsight are the plain backend's; TransformerLens' own patching functions agree."""

from typing import get_args

import pytest
import torch

import engine
import models
from bench.by_site import cells
from bench.families import wrapped

LIMIT = 1e-5
TOKENS = 9
POSITIONS = list(range(TOKENS))
# By site, the function of transformer_lens.patching; over layers x positions, or layers x positions x heads.
BY_LAYER = {
    "resid_pre": "get_act_patch_resid_pre",
    # Their setter writes in place, and so to the skip connection as well: under no_grad. Else the MLP alone reads it.
    "resid_mid": "get_act_patch_resid_mid",
    "attn_out": "get_act_patch_attn_out",
    "mlp_out": "get_act_patch_mlp_out",
}
BY_HEAD = {
    "z": "get_act_patch_attn_head_out_by_pos",
    "q": "get_act_patch_attn_head_q_by_pos",
    "k": "get_act_patch_attn_head_k_by_pos",
    "v": "get_act_patch_attn_head_v_by_pos",
    "pattern": "get_act_patch_attn_head_pattern_by_pos",
}


SITES = get_args(models.Site)
SOME = ("resid_mid", "mlp_act", "k", "scores")  # a part of a block, within a part, within attention


@pytest.mark.parametrize(
    ("family", "backend", "sites"),
    [
        ("llama", "transformer_lens", SOME),
        ("gpt2", "nnsight", SOME),
        *(
            pytest.param(family, backend, SITES, marks=pytest.mark.slow)
            for family in ("llama", "gpt2", "gemma2")
            for backend in ("transformer_lens", "nnsight")
        ),
    ],
)
def test_agree_with_plain(family, backend, sites):
    found = list(cells(family, backend, sites))
    assert not [cell.site for cell in found if cell.refused]
    assert max(cell.difference for cell in found) <= LIMIT
    assert all("batch" in cell.ran and "naive" in cell.ran for cell in found)


class Both:
    """A family, a source and a prompt, as TransformerLens and as we ask."""

    def __init__(self, family):
        from transformer_lens import patching

        self.functions = patching
        self.bridge = wrapped(family, torch.float32, "transformer_lens").bridge
        self.model = wrapped(family)
        source, self.prompt = torch.randint(97, (2, TOKENS), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            _, self.cache = self.bridge.run_with_cache(source[None])
        self.source = source

    def theirs(self, name):
        with torch.no_grad():
            function = getattr(self.functions, name)
            return function(self.bridge, self.prompt[None], self.cache, lambda logits: logits[0, -1, 5])

    def values(self, site):
        """[positions, layers, units, width]"""
        return engine.capture(self.model, [self.source], POSITIONS, sites=site)[0]

    def ours(self, site):
        """Every unit of every layer at every position: [layers, units, positions]."""
        size, values = self.model.site(site), self.values(site)
        each = torch.eye(size.n_layers * size.units).bool().unflatten(1, (size.n_layers, size.units))
        logits = [engine.patch(self.model, self.prompt, engine.Patch(site, each, values[p], p)) for p in POSITIONS]
        return torch.stack([one[:, 5] for one in logits], dim=-1).unflatten(0, (size.n_layers, size.units))


@pytest.fixture(scope="module", params=["llama", "gpt2", pytest.param("gemma2", marks=pytest.mark.slow)])
def both(request):
    return Both(request.param)


@pytest.mark.parametrize("site", BY_LAYER)
def test_layers_and_positions(both, site):
    torch.testing.assert_close(both.ours(site)[:, 0], both.theirs(BY_LAYER[site]), atol=LIMIT, rtol=0)


@pytest.mark.parametrize("site", BY_HEAD)
def test_heads_and_positions(both, site):
    """Their q and k stand before rotary positions, ours after: from the same position they come to the same."""
    want = both.theirs(BY_HEAD[site])  # [layers, positions, heads], of patterns [layers, heads, positions]
    want = want if site == "pattern" else want.transpose(1, 2)
    torch.testing.assert_close(both.ours(site), want, atol=LIMIT, rtol=0)


def test_all_positions_of_a_head(both):
    size, values = both.model.site("z"), both.values("z")
    each = torch.eye(size.n_layers * size.units).bool().unflatten(1, (size.n_layers, size.units))
    got = engine.patch(both.model, both.prompt, engine.Patch("z", each, values[None], POSITIONS))[:, 5]
    want = both.theirs("get_act_patch_attn_head_out_all_pos")
    torch.testing.assert_close(got.view_as(want), want, atol=LIMIT, rtol=0)


def test_all_sites_are_named():
    assert {*BY_LAYER, *BY_HEAD} < set(get_args(models.Site))


def test_queries_shown_before_they_are_scaled():
    """OPT scales its queries before attention sees them, TransformerLens shows them before: not the same site."""
    plain, bridged = wrapped("opt"), wrapped("opt", torch.float32, "transformer_lens")
    with pytest.raises(models.UnsupportedModelError, match=r"has no q: what its bridge shows as hook_q is not what"):
        bridged.site("q")
    ids = list(range(5, 17))
    patch = engine.Patch("k", [(0, 1), (2, 0)], torch.ones(3, plain.site("k").units, plain.site("k").width), [-1, -3])
    got, want = engine.patch(bridged, ids, patch), engine.naive.patch(plain, ids, patch)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
