"""What does not fit edges is refused before anything runs, in words that say what was given."""

import pytest
import torch

import engine
from engine import Example, Graph, attribute_edges, edge_runs, exact_edges
from tests.refusal import refused

PROMPTS, SOURCES = [[5, 6, 7], [8, 9]], [[5, 3, 7], [2, 9]]
GOOD = dict(prompts=PROMPTS, source=SOURCES, targets=[5, 6], progress=False)
BOTH = [
    (dict(prompts=[]), ValueError, "list of prompts", "got []"),
    (dict(prompts="Q: hot"), ValueError, "list of prompts", "'Q: hot'"),
    (dict(prompts=[Example([5, 6, 7], 5), [8, 9]], targets=None), ValueError, "all Examples"),
    (dict(prompts=[[5, 6, 7], [8, 97]]), ValueError, "97"),
    (dict(source=SOURCES[:1]), ValueError, "source must be a prompt for each of 2 prompts", "[[5, 3, 7]]"),
    (dict(source=None), ValueError, "source must be a prompt for each of 2 prompts", "None"),
    (dict(source="ab"), ValueError, "source must be a prompt for each of 2 prompts", "'ab'"),
    (dict(source=[[5, 3, 7], [2, 9, 1]]), ValueError, "prompt 1 has 2 tokens, its source 3"),
    (dict(targets=None), ValueError, "'probability' needs targets", "2 prompts"),
    (dict(targets=[5, 97]), ValueError, "97", "vocabulary of 97"),
    (dict(targets=[5, [6, 7]]), ValueError, "scored by one token", "prompts [1]", "scored='first_token'"),
    (dict(metric="logit_difference"), ValueError, "needs others"),
    (dict(metric="logit_difference", others=[1, [2, 3]]), ValueError, "scored by one token", "prompts [1]"),
    (dict(metric="accuracy"), ValueError, "metric must be one of", "'accuracy'"),
    (dict(scored="last"), ValueError, "scored must be one of", "'last'"),
    (dict(memory=0), ValueError, "memory must be a positive number", "0"),
]
ESTIMATED = [
    (dict(metric="rank"), ValueError, "'rank' has no gradient", "exact_edges"),
    (dict(metric="kl"), ValueError, "gradient of 'kl' is 0", "steps > 1"),
    (dict(steps=0), ValueError, "steps must be a positive integer", "0"),
]
EXACT = [
    (dict(edges=[]), ValueError, "edges must be a list of names", "got []"),
    (dict(edges="input->m0"), ValueError, "edges must be a list of names", "'input->m0'"),
    (dict(edges=["input->m0", "m0"]), ValueError, "'m0' is no edge", "a name like 'input->a0.h0<q>'"),
    (dict(edges=["m0->a3.h0<q>"]), ValueError, "'m0->a3.h0<q>' is no edge"),
    (dict(edges=["a0.h0->a1.h2<k>"]), ValueError, "is no edge"),  # there are two key/value heads
    (dict(edges=["m1->a1.h0<q>"]), ValueError, "is no edge", "m1 does not come before a1.h0<q>"),
    (dict(edges=[3]), ValueError, "3 is no edge"),
]


@pytest.fixture(autouse=True)
def _sites_found(model):
    Graph.of(model)


@pytest.mark.parametrize("case", [*BOTH, *ESTIMATED])
def test_attributed(model, case):
    given, error, *words = case
    with refused(model, error, *words):
        attribute_edges(model, **GOOD | given)


@pytest.mark.parametrize("case", [*BOTH, *EXACT])
def test_exact(model, case):
    given, error, *words = case
    with refused(model, error, *words):
        exact_edges(model, **dict(edges=["input->m0"]) | GOOD | given)


def test_runs(model):
    keep = Graph.of(model).exists
    cases = [
        ((PROMPTS[0], SOURCES[1], keep), "the prompt has 3 tokens, its source 2"),
        ((PROMPTS[0], SOURCES[0], keep[1:]), "keep must be a bool mask [rows, 22 senders, 34 receivers]", "[21, 34]"),
        ((PROMPTS[0], SOURCES[0], keep.float()), "keep must be a bool mask", "torch.float32"),
        ((PROMPTS[0], SOURCES[0], [True]), "keep must be a bool mask", "[True]"),
        ((PROMPTS[0], SOURCES[0], keep.expand(1, 1, *keep.shape)), "keep must be a bool mask", "[1, 1, 22, 34]"),
        ((PROMPTS[0], SOURCES[0], keep.expand(2, *keep.shape)[:0]), "keep must be a bool mask", "[0, 22, 34]"),
        (([], SOURCES[0], keep), "empty"),
    ]
    for given, *words in cases:
        with refused(model, ValueError, *words):
            edge_runs(model, *given)


def test_models():
    for call in (
        lambda: attribute_edges(torch.nn.Linear(2, 2), **GOOD),
        lambda: edge_runs(None, PROMPTS[0], SOURCES[0], None),
        lambda: engine.Graph.of("llama"),
    ):
        with pytest.raises(TypeError, match=r"expected a model of models.load"):
            call()
