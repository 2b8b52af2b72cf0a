"""A sweep of any site at any positions is a loop of forwards with plain hooks, whatever it saves on the way."""

import pytest
import torch

import engine
import models
from engine.questions import sweeping
from engine.questions.sweeping import together
from tests import plain
from tests.sites import LIMIT

IDS = [[5, 17, 33, 2, 71, 8, 90], [6, 17, 33, 4, 71, 80, 9]]
SOURCES = [[5, 18, 33, 3, 70, 8, 90], [6, 11, 30, 4, 7, 8, 9]]
TARGET = [13, 44]
ALONE = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
SITES = (*ALONE, "mlp_act", "z", "q", "k", "v", "pattern")


@torch.no_grad()
def loop(family, site, spots, units, into=IDS, source=SOURCES):
    """One hooked forward for each prompt, spot and unit, (layer, unit): log P(target), [prompts, spots, units]."""
    found = []
    for n, ids in enumerate(into):
        theirs = plain.activations(family.same, family.name, source[n], [site])[site]  # [L, T, U, W]
        for spot in spots[n]:
            values = torch.stack([theirs[:, p] for p in spot])
            for layer, unit in units:
                mask = torch.zeros(theirs.shape[0], theirs.shape[2], dtype=torch.bool)
                mask[layer, unit] = True
                changes = plain.patched(site, mask, values, spot)
                logits = plain.logits(family.same, family.name, ids, changes)
                found.append(logits.log_softmax(-1)[TARGET[n]])
    return torch.stack(found).view(len(into), len(spots[0]), -1)


def options(**more):
    return dict(source=SOURCES, targets=TARGET, metric="log_probability", progress=False) | more


EACH = [tuple((p,) for p in range(7))] * 2


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_all_positions(families, family, site):
    """Every unit at every position; of neurons, of which there are many, some of the units are looked at."""
    family = families(family)
    layers, n_units, _ = family.sizes(site, 7)
    some = [0, n_units - 1] if site == "mlp_act" else range(n_units)
    units = [(layer, unit) for layer in range(layers) for unit in some]
    effects = engine.sweep(family.model, IDS, **options(site=site, positions="all"))
    shape = (2, 7, layers) if n_units == 1 else (2, 7, layers, n_units)
    assert effects.patched.shape == shape
    got = effects.patched if n_units == 1 else effects.patched[..., list(some)]
    want = loop(family, site, EACH, units).double()
    torch.testing.assert_close(got.reshape(want.shape), want, atol=LIMIT, rtol=0)
    assert (want - effects.clean[:, None, None]).abs().max() > 100 * LIMIT
    assert list(effects.positions) == list(range(7))
    source = [
        plain.logits(family.same, family.name, ids).log_softmax(-1)[t] for ids, t in zip(SOURCES, TARGET, strict=True)
    ]
    torch.testing.assert_close(effects.reference, torch.stack(source).double(), atol=LIMIT, rtol=0)


@pytest.mark.parametrize("site", ["z", "resid_pre", "v", "pattern"])
def test_all_positions_together(families, site):
    family = families("llama")
    layers, n_units, _ = family.sizes(site, 7)
    effects = engine.sweep(family.model, IDS, **options(site=site, positions="together"))
    assert effects.positions is None
    every = [(tuple(range(7)),)] * 2
    want = loop(family, site, every, [(la, u) for la in range(layers) for u in range(n_units)]).double()
    torch.testing.assert_close(effects.patched.reshape(want.shape), want, atol=LIMIT, rtol=0)


@pytest.mark.parametrize("strategy", ["one call", "a call a position", "a row a pass"])
@pytest.mark.parametrize("site", ["resid_post", "k"])
def test_named_positions(families, site, strategy, monkeypatch):
    """An index a prompt: also the same token by two names, and prompts of other lengths."""
    family, into, source = families("llama"), [IDS[0], IDS[1][:5]], [SOURCES[0], SOURCES[1][:5]]
    named = {"subject": [1, 2], "verb": [4, 2], "last": [-1, -1]}
    monkeypatch.setattr(sweeping, "TOGETHER", 0 if strategy == "a call a position" else 10**6)
    memory = dict(memory=1) if strategy == "a row a pass" else {}
    effects = engine.sweep(family.model, into, **options(source=source, site=site, positions=named, **memory))
    layers, n_units, _ = family.sizes(site, 7)
    spots = [tuple((at[n],) for at in named.values()) for n in range(2)]
    want = loop(family, site, spots, [(la, u) for la in range(layers) for u in range(n_units)], into, source).double()
    torch.testing.assert_close(effects.patched.reshape(want.shape), want, atol=LIMIT, rtol=0)
    assert list(effects.positions) == list(named)
    assert effects.top(1)[0][0] in named


def test_answers_of_several_tokens(families):
    """The prompt is patched, its answer rides along: the sum of what plain hooks say token by token."""
    family, answer = families("llama"), [44, 3, 9]
    effects = engine.sweep(
        family.model, IDS[:1], **options(source=SOURCES[:1], targets=[answer], site="mlp_out", positions="all")
    )
    theirs = plain.activations(family.same, "llama", SOURCES[0], ["mlp_out"])["mlp_out"]
    for position, layer in ((6, 1), (0, 2), (3, 0)):
        mask = torch.zeros(3, 1, dtype=torch.bool)
        mask[layer] = True
        changes = plain.patched("mlp_out", mask, theirs[:, position][None], [position])
        said = 0.0
        for i, token in enumerate(answer):
            ids = IDS[0] + answer[:i]
            said += plain.logits(family.same, "llama", ids, changes).log_softmax(-1)[token].item()
        assert abs(effects.patched[0, position, layer].item() - said) <= LIMIT


@pytest.mark.parametrize("values", ["zero", "mean", "resample"])
def test_ablations(families, values):
    family = families("llama")
    effects = engine.sweep(family.model, IDS, values, **options(source=None, site="mlp_out", positions=[2, -1]))
    theirs = [plain.activations(family.same, "llama", ids, ["mlp_out"])["mlp_out"] for ids in IDS]  # [L, T, 1, W]
    new = {"zero": [theirs[0] * 0] * 2, "mean": [sum(theirs) / 2] * 2, "resample": theirs[::-1]}[values]
    for n, p, layer in ((0, 0, 1), (1, 1, 0), (1, 0, 2)):
        position = (2, 6)[p]
        mask = torch.zeros(3, 1, dtype=torch.bool)
        mask[layer] = True
        changes = plain.patched("mlp_out", mask, new[n][:, position][None], [position])
        want = plain.logits(family.same, "llama", IDS[n], changes).log_softmax(-1)[TARGET[n]]
        assert abs(effects.patched[n, p, layer].item() - want.item()) <= LIMIT


def test_groups_of_other_sites(families):
    family = families("llama")
    whole = torch.ones(3, 2, dtype=torch.bool)
    by_name = dict(groups={"all": whole, "first": whole & (torch.arange(3) == 0)[:, None]})
    effects = engine.sweep(family.model, IDS, **options(site="k", **by_name))
    layers = engine.sweep(family.model, IDS, **options(site="k", groups="layers"))
    torch.testing.assert_close(effects.patched[:, 1], layers.patched[:, 0], atol=1e-6, rtol=0)
    assert list(layers.groups) == ["layer 0", "layer 1", "layer 2"]
    heads = engine.sweep(family.model, IDS, **options(site="k"))
    assert heads.patched.shape == (2, 3, 2)


def test_attribution_is_the_slope(families):
    """At every site and position, against the exact effect of a small step."""
    family = families("llama")
    for site in ("resid_mid", "q", "mlp_act", "v"):
        estimate = engine.attribute(family.model, IDS, **options(site=site, positions="all"))
        one_by_one = [engine.attribute(family.model, IDS, **options(site=site, positions=p)).effect for p in (0, 3, 6)]
        torch.testing.assert_close(estimate.effect[:, [0, 3, 6]], torch.stack(one_by_one, dim=1), atol=1e-5, rtol=1e-4)
        n, p, layer, unit = 0, 3, 1, 0
        x = plain.activations(family.double, "llama", IDS[n], [site])[site][layer, p, unit]
        there = plain.activations(family.double, "llama", SOURCES[n], [site])[site][layer, p, unit]

        def at(step, x=x, there=there, site=site, where=(p, unit)):
            def change(new):
                new = new.clone()
                new[where] = x + step * (there - x)
                return new

            return plain.logits(family.double, "llama", IDS[0], [(site, 1, change)]).log_softmax(-1)[TARGET[0]].item()

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        found = estimate.effect[n, p, layer]
        assert abs((found if found.ndim == 0 else found[unit]).item() - slope) <= 1e-4 * max(1, abs(slope)), site


def test_calls_of_several_positions():
    """From the end of the prompt to its start, as many as make so many tokens."""
    firsts, n_units = list(range(16)), 30
    calls = together(firsts, 16, n_units)
    assert [s for call in calls for s in call] == firsts[::-1]
    for call in calls:
        tokens = len(call) * n_units * (16 - min(call))
        assert len(call) == 1 or tokens <= sweeping.TOGETHER
    assert len(calls) < 16


def test_units_that_a_layer_has_not():
    """They are left alone: no effect."""
    units = sweeping.Units(models.SiteShape(3, 4, 1, ((4, 1), (2, 1), (4, 1))))
    rows = units.rows(0, len(units))
    assert [int(row.sum()) for row in rows] == [1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]
