"""Scores of edges are slopes of the metric, and edges that are removed are those, by decoders written out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import models
from bench.families import wrapped
from engine import Graph, attribute_edges, edge_runs, exact_edges
from engine.questions.edges import runs as running
from engine.questions.metrics import read_metric
from models import UnsupportedModelError
from models.calls import Passing
from tests import plain
from tests.by_hand import Hand, circuit
from tests.refusal import state

FAMILIES = ["llama", "gpt2", "gpt_neox"]  # grouped heads; biases; attention and MLP in parallel
PROMPT, SOURCE = [5, 6, 7, 8, 9], [5, 16, 7, 8, 3]
TARGET, OTHER = 5, 7
KNOWN = dict(targets=[TARGET], others=[OTHER], progress=False)


@pytest.fixture(scope="module")
def made():
    """A function of the family: the model in float64, and the same by hand."""
    found = {}

    def make(family):
        if family not in found:
            hand = Hand(family)
            found[family] = models.wrap(plain.made(family, torch.float64), name=family), hand
        return found[family]

    return make


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def score(logits, metric="log_probability", clean=None):
    rows = logits if logits.ndim == 2 else logits[None]
    return read_metric(metric, [TARGET], [OTHER], prompts=1, vocab_size=97)(
        rows, TARGET, OTHER, rows[0] if clean is None else clean
    )


def every(graph, step):
    """Some of the edges, of every kind."""
    return graph.edges[::step] + [edge for edge in graph.edges if edge.endswith("->logits")]


def slope(hand, embedding, edge, change, metric="log_probability", h=1e-5, clean=None):
    """Of the metric, in a, with a * change added to what the edge's receiver is given."""
    receiver = edge.partition("->")[2]

    def at(a):
        return score(hand.run(embedding, lambda r, x, _: x + a * change if r == receiver else x)[0], metric, clean)[0]

    return (at(h) - at(-h)) / (2 * h)


@pytest.mark.parametrize("family", FAMILIES)
def test_graph(made, family):
    model, hand = made(family)
    graph = Graph.of(model)
    order = list(hand.run(PROMPT)[1])
    seen = {}
    hand.run(PROMPT, lambda receiver, x, senders: (seen.update({receiver: set(senders)}), x)[1])
    assert (set(graph.senders), set(graph.receivers)) == (set(order), set(seen))
    for u, sender in enumerate(graph.senders):
        for v, receiver in enumerate(graph.receivers):
            assert graph.exists[u, v] == (sender in seen[receiver])
    assert len(set(graph.edges)) == len(graph.edges) == graph.exists.sum()
    assert [graph.edge(name) for name in graph.edges] == [tuple(at) for at in graph.exists.nonzero().tolist()]
    assert graph.parallel == (family == "gpt_neox")
    for layer in range(graph.n_layers):
        assert graph.senders[graph.heads(layer)] == [f"a{layer}.h{h}" for h in range(graph.n_heads)]
        assert graph.senders[graph.mlp(layer)] == f"m{layer}"
        for site, receivers in graph.given(layer).items():
            names = graph.receivers[receivers]
            assert names == [f"m{layer}"] if site == "mlp_out" else all(name.endswith(f"<{site}>") for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_slope(made, family):
    model, hand = made(family)
    logits, here = hand.run(PROMPT)
    source_logits, there = hand.run(SOURCE)
    found = attribute_edges(model, [PROMPT], source=[SOURCE], metric="log_probability", **KNOWN)
    torch.testing.assert_close(found.clean, score(logits))
    torch.testing.assert_close(found.reference, score(source_logits))
    scores = dict(zip(found.groups, found.effect[0].tolist(), strict=True))
    for edge in every(Graph.of(model), 11):
        sender = edge.partition("->")[0]
        want = slope(hand, here["input"], edge, there[sender] - here[sender])
        assert scores[edge] == pytest.approx(want.item(), abs=1e-7), edge
    assert found.effect.abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "metric"), [("llama", "kl"), ("gpt2", "logit_difference"), ("gpt_neox", "probability")]
)
def test_along_a_path(made, family, metric):
    """Two steps: the mean of the slopes a quarter and three quarters of the way from the source's embedding."""
    model, hand = made(family)
    logits, here = hand.run(PROMPT)
    there = hand.run(SOURCE)[1]
    found = attribute_edges(model, [PROMPT], source=[SOURCE], steps=2, metric=metric, **KNOWN)
    scores = dict(zip(found.groups, found.effect[0].tolist(), strict=True))
    for edge in every(Graph.of(model), 29):
        sender = edge.partition("->")[0]
        change = there[sender] - here[sender]
        points = [there["input"] + a * (here["input"] - there["input"]) for a in (0.25, 0.75)]
        want = sum(slope(hand, point, edge, change, metric, clean=logits) for point in points) / 2
        assert scores[edge] == pytest.approx(want.item(), abs=1e-7), edge
    assert found.effect.abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_into_the_logits_sum(made, family):
    """All together they are the first-order difference of the last residual stream."""
    model, hand = made(family)
    found = attribute_edges(model, [PROMPT], source=[SOURCE], metric="logit_difference", **KNOWN)
    streams = []
    for ids in (PROMPT, SOURCE):
        hand.run(ids, lambda receiver, x, _: (streams.append(x) if receiver == "logits" else None, x)[1])
    at = [score(hand.logits(streams[0] + h * (streams[1] - streams[0])), "logit_difference") for h in (1e-5, -1e-5)]
    into = [edge.endswith("->logits") for edge in found.groups]
    torch.testing.assert_close(found.effect[:, into].sum(dim=1), (at[0] - at[1]) / 2e-5)


def test_near_nothing_it_is_exact(random):
    """Where the source's embeddings are nearly the prompt's the estimate is the effect, to second order."""
    errors = []
    direction = torch.randn(48, generator=random, dtype=torch.float64)
    for size in (1e-3, 1e-4):
        hf = plain.made("llama", torch.float64)
        table = hf.get_input_embeddings().weight
        table[16] = table[6] + size * direction
        model = models.wrap(hf, name="llama")
        given = dict(source=[[5, 16, 7, 8, 9]], metric="log_probability", **KNOWN)
        found = attribute_edges(model, [PROMPT], **given)
        exact = exact_edges(model, [PROMPT], edges=found.groups, **given)
        errors.append(((exact.effect - found.effect).abs().max() / exact.effect.abs().max()).item())
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("family", FAMILIES)
def test_circuits(made, random, family):
    """Random circuits, no edge, every edge, single edges removed: what the decoder written by hand says."""
    model, hand = made(family)
    graph = Graph.of(model)
    keep = (
        torch.rand(6, *graph.exists.shape, generator=random) < torch.tensor([0, 1, 0.1, 0.5, 0.9, 0.99])[:, None, None]
    )
    got = edge_runs(model, PROMPT, SOURCE, keep)
    assert got.dtype == torch.float64
    for row, logits in zip(keep, got, strict=True):
        removed = {
            name for name, (u, v) in zip(graph.edges, graph.exists.nonzero().tolist(), strict=True) if not row[u, v]
        }
        torch.testing.assert_close(logits, circuit(hand, PROMPT, SOURCE, removed))
    for row, ids in ((0, SOURCE), (1, PROMPT)):
        torch.testing.assert_close(got[row], plain.logits(model.hf, family, ids))
    torch.testing.assert_close(edge_runs(model, PROMPT, SOURCE, keep[3].numpy()), got[3])


@pytest.mark.parametrize("family", FAMILIES)
def test_single_edges(made, family):
    model, hand = made(family)
    edges = every(Graph.of(model), 11)[::-1]
    found = exact_edges(model, [PROMPT, SOURCE], source=[SOURCE, PROMPT], edges=edges, targets=[5, 5], progress=False)
    assert found.groups == edges
    for n, pair in enumerate([(PROMPT, SOURCE), (SOURCE, PROMPT)]):
        want = torch.cat([score(circuit(hand, *pair, {edge}), "probability") for edge in edges])
        torch.testing.assert_close(found.patched[n], want)
        clean, reference = (score(hand.run(ids)[0], "probability")[0] for ids in pair)
        torch.testing.assert_close((found.clean[n], found.reference[n]), (clean, reference))


def test_is_path_patching_by_hooks(made):
    """A head's keys computed from a stream that lacks what an earlier head gives: plain hooks say the same."""
    model = made("llama")[0]
    hf = model.hf
    z = [plain.activations(hf, "llama", ids, ["z"])["z"][0] for ids in (PROMPT, SOURCE)]
    w_o = hf.model.layers[0].self_attn.o_proj.weight[:, 8:16]
    sent = (z[1] - z[0])[:, 1] @ w_o.T
    k = plain.activations(hf, "llama", PROMPT, ["k"], [("resid_pre", 2, lambda x: x + sent[:, None])])["k"][2]

    def put(x):
        x = x.clone()
        x[:, 1] = k[:, 1]
        return x

    want = plain.logits(hf, "llama", PROMPT, [("k", 2, put)])
    got = exact_edges(model, [PROMPT], source=[SOURCE], edges=["a0.h1->a2.h1<k>"], metric="logit_difference", **KNOWN)
    torch.testing.assert_close(got.patched[0], score(want, "logit_difference"))
    assert got.effect.abs().max() > 1e-3


@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen3", "phi3", "opt", "qwen2"])
def test_families(family):
    """In float32: none and all, and the estimate of a change that is small."""
    model = wrapped(family)
    graph = Graph.of(model)
    none = torch.zeros(2, *graph.exists.shape, dtype=torch.bool)
    none[1] = True
    got = edge_runs(model, PROMPT, SOURCE, none)
    for row, ids in ((0, SOURCE), (1, PROMPT)):
        want = model.forward(torch.tensor([ids]))[0]
        assert (got[row] - want).abs().max() < 1e-5 * want.abs().max() + 1e-5
    found = attribute_edges(model, [PROMPT], source=[SOURCE], steps=3, **KNOWN)
    assert found.effect.abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*")  # of the libraries
@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_other_backends(backend):
    model, same = wrapped("llama", torch.float32, backend), wrapped("llama")
    keep = Graph.of(same).exists.clone()
    keep[:7] = False
    got, want = (
        (
            attribute_edges(one, [PROMPT], source=[SOURCE], steps=2, **KNOWN).patched,
            edge_runs(one, PROMPT, SOURCE, keep),
        )
        for one in (model, same)
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*")  # of the libraries
def test_images():
    """Prompts whose text is the same, of other pictures."""
    model, random = wrapped("llava"), np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (28, 28, 3), dtype=np.uint8)) for _ in range(2)]
    prompt, source = (models.Prompt(f"{models.IMAGE} Q: which?\nA:", (picture,)) for picture in pictures)
    keep = torch.ones(2, *Graph.of(model).exists.shape, dtype=torch.bool)
    keep[1] = False
    got = edge_runs(model, prompt, source, keep)
    want = torch.stack([engine.naive.patch(model, one, heads=None, values=None)[0] for one in (prompt, source)])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    found = attribute_edges(model, [prompt], source=[source], **KNOWN)
    assert found.effect.abs().max() > 1e-4


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_norms_behind(family):
    model = wrapped(family)
    before = state(model)
    for call in (
        lambda: attribute_edges(model, [PROMPT], source=[SOURCE], **KNOWN),
        lambda: edge_runs(model, PROMPT, SOURCE, Graph.of(model).exists),
        lambda: exact_edges(model, [PROMPT], source=[SOURCE], edges=["input->m0"], **KNOWN),
    ):
        with pytest.raises(UnsupportedModelError, match=f"{family} does not add the output of attention in layer 0"):
            call()
    assert state(model) == before


def test_sites_that_are_missing():
    with pytest.raises(UnsupportedModelError, match="bloom has no q"):
        attribute_edges(wrapped("bloom"), [PROMPT], source=[SOURCE], **KNOWN)


def test_mlps_that_see_attention_nobody_knows_where(made):
    """Without a resid_mid blocks are taken for parallel only if their MLPs do not see attention."""
    model = models.wrap(plain.made("llama"), name="odd")
    model._places["resid_mid"] = "the tests say so"
    with pytest.raises(UnsupportedModelError, match="odd has no resid_mid: the tests say so"):
        Graph.of(model)


def test_several_prompts(model):
    """Each by itself, of any lengths; and as Examples."""
    prompts, sources = [PROMPT, [12, 13, 14]], [SOURCE, [12, 3, 14]]
    given = dict(metric="log_probability", steps=2, progress=False)
    both = attribute_edges(model, prompts, source=sources, targets=[5, 6], **given)
    for n in range(2):
        alone = attribute_edges(model, prompts[n : n + 1], source=sources[n : n + 1], targets=[[5], [6]][n], **given)
        torch.testing.assert_close(both.patched[n], alone.patched[0])
    examples = [engine.Example(p, t) for p, t in zip(prompts, [5, 6], strict=True)]
    assert torch.equal(attribute_edges(model, examples, source=sources, **given).patched, both.patched)
    assert both.metadata["estimate"] == "edge attribution patching"
    assert both.metadata["steps"] == both.metadata["prompts"] == 2


def test_saved(model, tmp_path):
    found = attribute_edges(model, [PROMPT], source=[SOURCE], **KNOWN)
    found.save(tmp_path / "edges.safetensors")
    again = engine.Effects.load(tmp_path / "edges.safetensors")
    assert torch.equal(again.patched, found.patched)
    assert again.top(3) == found.top(3)


def test_answers(model):
    """Of several tokens the first, if it is said so."""
    given = dict(source=[SOURCE], metric="log_probability", progress=False)
    first = attribute_edges(model, [PROMPT], targets=[[5, 6]], scored="first_token", **given)
    assert torch.equal(first.patched, attribute_edges(model, [PROMPT], targets=[5], **given).patched)


def test_little_memory(model, random):
    """One row a forward, and the same."""
    given = dict(source=[SOURCE], **KNOWN)
    whole, parts = (attribute_edges(model, [PROMPT], steps=4, memory=m, **given) for m in (None, 1))
    torch.testing.assert_close(parts.patched, whole.patched, atol=1e-5, rtol=1e-4)
    edges = Graph.of(model).edges[::40]
    whole, parts = (exact_edges(model, [PROMPT], edges=edges, memory=m, **given) for m in (None, 1))
    torch.testing.assert_close(parts.patched, whole.patched, atol=1e-5, rtol=1e-4)
    keep = torch.rand(3, *Graph.of(model).exists.shape, generator=random) < 0.5
    whole, parts = (edge_runs(model, PROMPT, SOURCE, keep, memory=m) for m in (None, 1))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_one_forward_for_all_steps(model):
    sizes = []
    attribute_edges(model, [PROMPT], source=[SOURCE], **KNOWN)
    handle = model.hf.register_forward_pre_hook(
        Passing(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"]))), with_kwargs=True
    )
    try:
        attribute_edges(model, [PROMPT], source=[SOURCE], steps=7, **KNOWN)
        assert sizes == [1, 1, 7]
        sizes.clear()
        exact_edges(model, [PROMPT], source=[SOURCE], edges=Graph.of(model).edges[:10], **KNOWN)
        assert sizes == [1, 1, 20]
    finally:
        handle.remove()


def test_satellites_are_shared(made, random):
    """As many as a layer has receivers that are given different things; none for those that nothing is removed from."""
    graph = Graph.of(made("llama")[0])
    keep = torch.ones(1, *graph.exists.shape, dtype=torch.bool)
    assert running.Circuits.of(graph, keep).members == 1
    keep[:, 0] = False
    assert running.Circuits.of(graph, keep).members == 2
    assert (
        running.Circuits.of(graph, torch.rand(1, *graph.exists.shape, generator=random) < 0.5).members <= 1 + 6 + 2 + 2
    )
    keep[:] = True
    keep[:, :, -1] = False
    assert running.Circuits.of(graph, keep).members == 1


def test_the_model_is_left_alone():
    model = models.wrap(plain.made("llama"), name="llama")
    parameters = list(model.hf.parameters())
    attribute_edges(model, [PROMPT], source=[SOURCE], **KNOWN)
    before, results = state(model), []
    for requires in (True, False):
        for parameter in parameters:
            parameter.requires_grad_(requires)
            parameter.grad = torch.full_like(parameter, 3.0) if requires else None
        results.append(attribute_edges(model, [PROMPT], source=[SOURCE], steps=2, **KNOWN))
        edge_runs(model, PROMPT, SOURCE, ~Graph.of(model).exists)
        for parameter in parameters:
            assert parameter.requires_grad == requires
            assert parameter.grad is None or (parameter.grad == 3).all()
    torch.testing.assert_close(results[0].patched, results[1].patched, atol=1e-6, rtol=0)
    assert state(model) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_where_no_gradients_are_recorded(model, context):
    given = dict(source=[SOURCE], **KNOWN)
    want = attribute_edges(model, [PROMPT], steps=2, **given)
    keep = Graph.of(model).exists.clone()
    keep[0] = False
    logits = edge_runs(model, PROMPT, SOURCE, keep)
    with context():
        assert torch.equal(attribute_edges(model, [PROMPT], steps=2, **given).patched, want.patched)
        found = edge_runs(model, PROMPT, SOURCE, keep)
        exact_edges(model, [PROMPT], edges=["input->m0"], **given)
    assert not found.requires_grad
    torch.testing.assert_close(found, logits)


def test_half_precision():
    found = [
        attribute_edges(
            models.wrap(plain.made("llama", dtype), name="llama"), [PROMPT], source=[SOURCE], steps=3, **KNOWN
        )
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert found[0].patched.dtype == torch.float64
    assert found[0].rank_correlation(found[1]) > 0.9


def test_models_and_metrics_without_gradients(model):
    with pytest.raises(ValueError, match="the metric records no gradient"):
        attribute_edges(model, [PROMPT], source=[SOURCE], metric=lambda logits: logits.detach()[:, 3], progress=False)
    found = attribute_edges(model, [PROMPT], source=[SOURCE], metric=lambda logits: logits[:, 3], progress=False)
    assert found.metric == "custom"
    with torch.inference_mode():
        frozen = models.wrap(plain.made("llama"), name="frozen")
    with pytest.raises(UnsupportedModelError, match=r"frozen gives no gradients: .*inference mode"):
        attribute_edges(frozen, [PROMPT], source=[SOURCE], **KNOWN)
    quantised = models.wrap(plain.made("llama"), name="quantised")
    for projection in quantised.projections:
        projection.forward = torch.no_grad()(projection.forward)
    with pytest.raises(UnsupportedModelError, match="quantised gives no gradients: its layers record none"):
        attribute_edges(quantised, [PROMPT], source=[SOURCE], **KNOWN)
