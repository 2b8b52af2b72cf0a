"""Sweeps of sites, paths and knockouts: what does not fit is refused in words, before any forward."""

import pytest
import torch

import engine
import models
from tests.refusal import refused

IDS, SOURCES = [[5, 17, 33, 2, 71], [6, 17, 33, 4, 71]], [[5, 18, 33, 3, 70], [6, 11, 30, 4, 7]]
SHORT = [[5, 18, 33, 3, 70], [6, 11, 30]]


@pytest.fixture(scope="module")
def idle(tiny):
    """The model, its sites found."""
    for site in ("resid_post", "mlp_out", "mlp_act", "q", "k", "v", "pattern", "scores"):
        tiny("llama").site(site)
    return tiny("llama")


def options(**more):
    return dict(source=SOURCES, targets=[3, 4], progress=False) | more


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(site="resid"), ValueError, ["site must be one of", "'resid_pre'", "got 'resid'"]),
        (dict(site="scores"), ValueError, ["-inf", "sweep_knockout"]),
        (dict(positions="every"), ValueError, ["'all', 'together' or tokens by name", "got 'every'"]),
        (dict(positions={}), ValueError, ["no positions were named"]),
        (dict(positions={"subject": [1]}), ValueError, ["'subject'", "each of 2 prompts, got 1"]),
        (dict(positions={"subject": [1, "b"]}), TypeError, ["index for each prompt", "'subject'"]),
        (dict(positions={"subject": [1, 9]}), IndexError, ["position 9", "5 tokens"]),
        (dict(positions="all", source=SHORT), ValueError, ["prompt 1 has 5 tokens, its source 3", "must match"]),
        (dict(positions="together", source=SHORT), ValueError, ["prompt 1 has 5 tokens, its source 3", "together"]),
        (dict(positions={"a": [1, 1]}, source=SHORT), ValueError, ["prompt 1", "must match"]),
        (dict(site="pattern", source=SHORT), ValueError, ["prompt 1", "pattern", "must match"]),
        (dict(groups="heads", site="mlp_out"), ValueError, ["groups='heads'", "'mlp_out'"]),
        (dict(groups={"a": torch.ones(3, 6).bool()}, site="k"), ValueError, ["group 'a'", "bool mask [3, 2]"]),
        (dict(source=None, values="zero", site="pattern"), ValueError, ["pattern of zeros", "sweep_knockout"]),
        (dict(source=None, values=torch.ones(3, 6, 8), site="k"), ValueError, ["[3, 2, 8]", "got [3, 6, 8]"]),
    ],
)
def test_sweep(idle, given, error, words):
    given = options(**given)
    for verb in (engine.sweep,) if "groups" in given else (engine.sweep, engine.attribute):
        with refused(idle, error, *words):
            verb(idle, IDS, **given)


def test_lengths_of_prompts(idle):
    ids = [IDS[0], IDS[1][:4]]
    with refused(idle, ValueError, "at all positions", "prompt 0 has 5, prompt 1 4", "name positions"):
        engine.sweep(idle, ids, "zero", targets=[3, 4], positions="all", progress=False)
    for values in ("mean", "resample"):
        with refused(idle, ValueError, values, "together", "prompt 0 has 5, prompt 1 4"):
            engine.sweep(idle, ids, values, targets=[3, 4], positions="together", progress=False)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(receivers="a9.h0<q>"), IndexError, ["'a9.h0<q>' is out of range", "3 layers x 6"]),
        (dict(receivers="a1.h2<k>"), IndexError, ["out of range", "3 layers x 2"]),
        (dict(receivers="h3"), ValueError, ["expected a node", "'h3'"]),
        (dict(receivers="a2.h0"), ValueError, ["receivers are", "'a2.h0'"]),
        (dict(receivers=["m2", "logits"]), ValueError, ["logits alone"]),
        (dict(receivers=[]), ValueError, ["one receiver"]),
        (dict(receivers="a0.h1<q>"), ValueError, ["must come after", "a0.h1<q> before a0.h0"]),
        (dict(receivers="a1.h1<q>", senders=["a0.h1", "a2.h1"]), ValueError, ["must come after", "before a2.h1"]),
        (dict(receivers="m1", senders=["m1"]), ValueError, ["m1 before m1"]),
        (dict(senders=["a0.h1<q>"]), ValueError, ["senders are heads and MLPs", "'a0.h1<q>'"]),
        (dict(senders=["logits"]), ValueError, ["senders are", "'logits'"]),
        (dict(senders=[]), ValueError, ["no senders"]),
        (dict(senders=[(0, 7)]), IndexError, ["out of range"]),
        (dict(freeze="MLPs"), ValueError, ["freeze must be one of", "got 'MLPs'"]),
        (dict(source=SHORT, positions=2), ValueError, ["prompt 1 has 5 tokens, its source 3"]),
        (dict(source=SOURCES[:1]), ValueError, ["a prompt for each of 2 prompts"]),
        (dict(targets=[[3, 4], 5]), ValueError, ["one token", "prompt 0 has several", "first_token"]),
        (dict(targets=None), ValueError, ["needs targets"]),
    ],
)
def test_paths(idle, given, error, words):
    with refused(idle, error, *words):
        engine.paths(idle, IDS, **options(**given))


@pytest.mark.parametrize(
    ("keys", "more", "error", "words"),
    [
        ({}, {}, ValueError, ["keys must be tokens by name"]),
        ([[0], [1]], {}, ValueError, ["keys must be tokens by name"]),
        ({"a": [[0]]}, {}, ValueError, ["'a'", "each of 2 prompts, got 1"]),
        ({"a": [[0], []]}, {}, TypeError, ["'a'", "one at least"]),
        ({"a": [[0], ["b"]]}, {}, TypeError, ["'a'"]),
        ({"a": [[0], [7]]}, {}, IndexError, ["token 7", "5 tokens"]),
        ({"a": [[3], [0]]}, dict(positions=2), ValueError, ["key 3", "comes after token 2"]),
        ({"a": [[0, 1, 2], [0]]}, dict(positions=2), ValueError, ["all 3 tokens", "nothing is left"]),
        ({"a": "picture"}, {}, ValueError, ["'image', got 'picture'"]),
        ({"a": "image"}, {}, ValueError, ["prompt 0 has none"]),
        ({"a": [0, 0]}, dict(window=0), ValueError, ["window"]),
        ({"a": [0, 0]}, dict(metric="rank", targets=[[3, 4], 5]), ValueError, ["'rank' is of one token"]),
    ],
)
def test_knockout(idle, keys, more, error, words):
    with refused(idle, error, *words):
        engine.sweep_knockout(idle, IDS, keys, **dict(targets=[3, 4], progress=False) | more)


def test_sites_that_a_model_has_not(tiny):
    with pytest.raises(models.UnsupportedModelError, match="has no pattern"):
        engine.sweep(tiny("gptj"), IDS, site="pattern", **options())


RANKED = engine.Effects(torch.rand(2, 3, 6), torch.zeros(2))


@pytest.mark.parametrize(
    ("ranking", "more", "words"),
    [
        ([], {}, ["ranking must be effects"]),
        ("z", {}, ["ranking must be effects"]),
        (engine.Effects(torch.rand(2, 4, 6), torch.zeros(2)), {}, ["must be of [3, 6]"]),
        (engine.Effects(torch.rand(2, 1, 3, 6), torch.zeros(2), positions=[0]), {}, ["by positions"]),
        (engine.Effects(torch.rand(2, 2), torch.zeros(2), groups=["a", "b"]), {}, ["names alone"]),
        (
            engine.Effects(torch.rand(2, 1), torch.zeros(2), groups={"a": torch.ones(3, 6).bool()}, site="k"),
            {},
            ["[3, 2]"],
        ),
        ([RANKED, RANKED], {}, ["in one item", "[0, 0] (layer, unit) of z is in several"]),
        (
            engine.Effects(torch.rand(2, 2), torch.zeros(2), groups=dict.fromkeys("ab", torch.ones(3, 6).bool())),
            {},
            ["in one item", "is in several"],
        ),
        (RANKED, dict(sizes=(0.5, 0.1)), ["sizes must be shares", "ascending"]),
        (RANKED, dict(sizes=(0.5, 50)), ["sizes must be shares"]),
        (RANKED, dict(sizes=()), ["sizes must be shares"]),
        (RANKED, dict(by="size"), ["by must be one of"]),
        (RANKED, dict(positions=[1, 2]), ["at one token, or at all together"]),
        (RANKED, dict(source=None), ["either values or source"]),
        (RANKED, dict(source=SHORT), ["prompt 1 has 5 tokens, its source 3"]),
        (RANKED, dict(metric="logit_difference"), ["needs others"]),
    ],
)
def test_faithfulness(idle, ranking, more, words):
    with refused(idle, ValueError, *words):
        engine.circuits.faithfulness(idle, IDS, ranking, **options(metric="probability") | more)


def test_circuits_of_too_many(idle):
    for verb in (engine.circuits.completeness, engine.circuits.minimality):
        with refused(idle, ValueError, "at most 18 items", "got 19"):
            verb(idle, IDS, RANKED, 19, **options(metric="probability"))
        with refused(idle, TypeError, "unexpected keyword argument 'window'"):
            verb(idle, IDS, RANKED, 9, **options(metric="probability", window=3))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(values="zero", source=None), ["edges are of all sites"]),
        (dict(site="k"), ["edges are of all sites"]),
        (dict(positions=[1]), ["edges are of all sites"]),
        (dict(source=None), ["source must be a prompt for each of 2 prompts"]),
        (dict(source=SHORT), ["prompt 1 has 5 tokens, its source 3"]),
    ],
)
def test_attribution_of_edges(idle, more, words):
    with refused(idle, ValueError, *words):
        engine.attribute(idle, IDS, edges=True, **options(**more))


def test_circuits_of_edges(idle):
    engine.Graph.of(idle)  # whose sites are looked for
    some = engine.Effects(torch.rand(1, 2), torch.zeros(1), groups=["a0.h0->a1.h0<q>", "m0->logits"])
    with refused(idle, ValueError, "must be of all", "edges of tiny-llama"):
        engine.circuits.faithfulness(idle, IDS, some, **options(metric="probability"))
