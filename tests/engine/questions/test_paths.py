"""Path patching is two plain hooked forwards a sender, as the paper does it."""

import pytest
import torch

import engine
import models
from tests import plain
from tests.sites import LIMIT

IDS = [[5, 17, 33, 2, 71, 8, 90], [6, 17, 33, 4, 71, 80, 9]]
SOURCES = [[5, 18, 33, 3, 70, 8, 90], [6, 11, 30, 4, 7, 8, 9]]
TARGET = [13, 44]
T, LAST = 7, (6,)


def options(**more):
    return dict(source=SOURCES, targets=TARGET, metric="log_probability", progress=False) | more


def put(layer, site, tokens, unit, new):
    """A change: these tokens of one unit (None: all) become those of new [T, units, width]."""

    def change(x):
        x = x.clone()
        for token in tokens:
            x[token, slice(None) if unit is None else unit] = new[token, slice(None) if unit is None else unit]
        return x

    return site, layer, change


def hold(layer, tokens, unit, theirs, ours):
    """Z of a layer as it was, but for one head (None: none) of the source."""

    def change(x):
        x = x.clone()
        for token in tokens:
            x[token] = ours[token]
            if unit is not None:
                x[token, unit] = theirs[token, unit]
        return x

    return "z", layer, change


@torch.no_grad()
def one(family, n, sender, receivers, spot, mlps_too=False):
    """The target's log-probability after both passes, by hooks on every layer. sender: (layer, head), or None: MLP."""
    hf, name, layers = family.same, family.name, family.n_layers
    sites = ["z", "mlp_out"]
    ours = plain.activations(hf, name, IDS[n], sites)
    theirs = plain.activations(hf, name, SOURCES[n], sites)
    layer, head = sender
    changes = []
    for each in range(layers):
        if head is not None and each == layer:
            changes.append(put(each, "z", spot, head, theirs["z"][each]))
        if each > layer:
            changes.append(put(each, "z", range(T), None, ours["z"][each]))
    seen = {}
    for each in range(layers):  # what an MLP makes of its input, before it is held

        def look(x, each=each):
            seen[each] = x.clone()
            return x

        changes.append(("mlp_out", each, look))
        if head is None and each == layer:
            changes.append(put(each, "mlp_out", spot, None, theirs["mlp_out"][each]))
        elif mlps_too and (each > layer or (head is not None and each == layer)):
            changes.append(put(each, "mlp_out", range(T), None, ours["mlp_out"][each]))
    if receivers == "logits":
        logits = plain.logits(hf, name, IDS[n], changes)
        return logits.log_softmax(-1)[TARGET[n]]
    wanted = [site for site in ("q", "k", "v") if any(site == r[0] for r in receivers)]
    kept = plain.activations(hf, name, IDS[n], wanted, changes) if wanted else {}
    if not wanted:
        plain.logits(hf, name, IDS[n], changes)
    second = []
    for site, to, unit in receivers:
        new = seen[to] if site == "mlp_out" else kept[site][to]
        second.append(put(to, site, spot, unit, new))
    return plain.logits(hf, name, IDS[n], second).log_softmax(-1)[TARGET[n]]


CASES = [
    ("logits", "logits"),
    (["a2.h1<q>", "a1.h4<q>"], [("q", 2, 1), ("q", 1, 4)]),
    ([(2, 1, "k"), "a2.h0<v>"], [("k", 2, 1), ("v", 2, 0)]),
    ("m2", [("mlp_out", 2, 0)]),
    (["m1", "a2.h3<q>"], [("mlp_out", 1, 0), ("q", 2, 3)]),
]


@pytest.mark.parametrize("freeze", ["heads", "heads and MLPs"])
@pytest.mark.parametrize(("receivers", "plainly"), CASES, ids=["logits", "queries", "keys", "mlp", "both"])
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_every_head(families, family, receivers, plainly, freeze):
    family = families(family)
    if family.name == "gpt2" and receivers != "logits" and "k" in str(receivers):
        plainly = [(site, layer, unit) for site, layer, unit in plainly]
    effects = engine.paths(family.model, IDS, receivers=receivers, freeze=freeze, **options())
    assert effects.patched.shape == (2, 3, 6)
    for n, layer, head in ((0, 0, 0), (0, 1, 5), (1, 1, 2), (1, 0, 3), (1, 2, 1)):
        want = one(family, n, (layer, head), plainly, LAST, freeze != "heads")
        assert abs(effects.patched[n, layer, head].item() - want.item()) <= LIMIT, (n, layer, head)
    if receivers != "logits":
        after = [(2, h) for h in range(6)] if "m2" not in receivers else []
        assert all(abs(effects.effect[:, la, h]).max() <= 1e-6 for la, h in after if plainly[0][0] != "mlp_out")
    assert effects.effect.abs().max() > 100 * LIMIT


@pytest.mark.parametrize(("positions", "spots"), [("together", [range(T)]), ([2, -1], [(2,), (6,)]), (3, [(3,)])])
@pytest.mark.parametrize("receivers", ["logits", ["a2.h1<k>", "a2.h0<q>"]])
def test_other_positions(families, positions, spots, receivers):
    family = families("llama")
    plainly = "logits" if receivers == "logits" else [("k", 2, 1), ("q", 2, 0)]
    effects = engine.paths(family.model, IDS, receivers=receivers, positions=positions, **options())
    patched = effects.patched if effects.positions is not None else effects.patched[:, None]
    for n, layer, head in ((0, 1, 5), (1, 0, 3)):
        for p, spot in enumerate(spots):
            want = one(family, n, (layer, head), plainly, spot)
            assert abs(patched[n, p, layer, head].item() - want.item()) <= LIMIT


@pytest.mark.parametrize("freeze", ["heads", "heads and MLPs"])
def test_mlps_send(families, freeze):
    family = families("llama")
    effects = engine.paths(family.model, IDS, senders="MLPs", receivers="a2.h1<q>", freeze=freeze, **options())
    assert effects.patched.shape == (2, 3)
    assert effects.site == "mlp_out"
    for n, layer in ((0, 0), (1, 1)):
        want = one(family, n, (layer, None), [("q", 2, 1)], LAST, freeze != "heads")
        assert abs(effects.patched[n, layer].item() - want.item()) <= LIMIT
    assert effects.effect[:, 2].abs().max() <= LIMIT  # q of its own layer does not read it


def test_named_senders(families):
    family = families("llama")
    every = engine.paths(family.model, IDS, receivers="m2", **options())
    named = engine.paths(family.model, IDS, receivers="m2", senders=["a1.h3", (0, 2), "m1"], **options())
    assert list(named.groups) == ["a1.h3", "a0.h2", "m1"]
    torch.testing.assert_close(named.patched[:, 0], every.patched[:, 1, 3], atol=1e-6, rtol=0)
    torch.testing.assert_close(named.patched[:, 1], every.patched[:, 0, 2], atol=1e-6, rtol=0)


def test_little_memory(families):
    family = families("llama")
    given = options(receivers=["a2.h1<q>", "m2"])
    whole = engine.paths(family.model, IDS, **given)
    in_parts = engine.paths(family.model, IDS, memory=1, **given)
    torch.testing.assert_close(in_parts.patched, whole.patched, atol=LIMIT, rtol=0)
    torch.testing.assert_close(in_parts.clean, whole.clean, atol=LIMIT, rtol=0)


@pytest.mark.parametrize("family", ["gpt_neox", "mistral", "gptj"])
def test_naive_agrees(families, family):
    """By naive forwards of the same patches, on parallel blocks, windows, and attention that is not seen."""
    family = families(family)
    model = family.model
    effects = engine.paths(model, IDS, freeze="heads and MLPs", **options())
    ours = engine.capture(model, IDS, sites=("z", "mlp_out"))
    theirs = engine.capture(model, SOURCES)
    for n, layer, head in ((0, 0, 3), (1, 1, 2)):
        later = torch.arange(model.shape.n_layers) > layer
        held = later if family.name != "mistral" else later | (torch.arange(3) == layer)
        patches = [
            engine.Patch("z", [(layer, head)], theirs[n]),
            engine.Patch("z", later[:, None].expand(-1, model.shape.n_heads), ours["z"][n]),
            engine.Patch("mlp_out", held[None], ours["mlp_out"][n]),
        ]
        want = engine.naive.patch(model, IDS[n], patches)[0].log_softmax(-1)[TARGET[n]]
        assert abs(effects.patched[n, layer, head].item() - want.item()) <= LIMIT
    with pytest.raises(models.UnsupportedModelError, match="has no q"):
        engine.paths(families("gptj").model, IDS, receivers="a2.h0<q>", **options())


def test_paths_of_the_edge_add_up_to_first_order(families):
    """Along all edges from a head, small changes add up to what patching the head does."""
    family = families("llama")
    # The last layer's heads reach the logits by its MLP and by themselves: with both, all there is.
    direct = engine.paths(family.model, IDS, **options())
    whole = engine.sweep(family.model, IDS, **options())
    torch.testing.assert_close(direct.effect[:, 2], whole.effect[:, 2], atol=1e-5, rtol=0)


def test_a_tuple_of_three_receivers(families):
    """Names, or nodes, as a list of them; and one node that is a tuple of three."""
    model = families("llama").model
    names = ("a1.h0<q>", "a1.h1<q>", "m1")
    want = engine.paths(model, IDS, receivers=list(names), **options()).patched
    assert torch.equal(engine.paths(model, IDS, receivers=names, **options()).patched, want)
    one = engine.paths(model, IDS, receivers=(1, 0, "q"), **options()).patched
    assert torch.equal(one, engine.paths(model, IDS, receivers="a1.h0<q>", **options()).patched)
    both = engine.paths(model, IDS, receivers=((1, 0, "q"), (1, 1, "q"), "m1"), **options()).patched
    assert torch.equal(both, want)
