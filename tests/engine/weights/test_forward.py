"""Exact against copies of the model whose weights are written over, sample by sample."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import weights
from engine.weights import looking, products
from engine.weights.products import SAMPLES, TILE
from tests.engine.weights.networks import (
    NETWORKS,
    Attention,
    Convolutions,
    Normed,
    Tied,
    TokensFirst,
    Vision,
    by_hand,
    draw,
    leaves,
    off,
    setting,
)

networks = pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
quiet = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:.*weight_norm.*:FutureWarning")
pytestmark = quiet


def found_apart(model):
    """Modules that were found to need to run sample by sample."""
    return set().union(*(layout.apart for layout in looking._known[model].values()))


@networks
@pytest.mark.parametrize("way", ["auto", "merge", "wide"])
def test_every_way_is_exact(kind, way):
    base, tuned, inputs = setting(kind)
    vectors = weights.task_vectors(base, *tuned)
    c = draw(vectors)
    with torch.no_grad():
        assert off(weights.forward(base, inputs, vectors, c, way=way), by_hand(base, tuned, inputs, c)) <= 1e-12


@networks
def test_float32(kind):
    base, tuned, inputs = setting(kind, torch.float32)
    vectors = weights.task_vectors(base, *tuned)
    c = draw(vectors, dtype=torch.float32)
    with torch.no_grad():
        assert off(weights.forward(base, inputs, vectors, c), by_hand(base, tuned, inputs, c)) <= 1e-5


@networks
def test_naive_is_what_it_says(kind):
    base, tuned, inputs = setting(kind)
    vectors = weights.task_vectors(base, *tuned)
    c = draw(vectors)
    with torch.no_grad():
        assert off(weights.naive.forward(base, inputs, vectors, c), by_hand(base, tuned, inputs, c)) <= 1e-12


def test_what_runs_sample_by_sample():
    expected = {
        Vision: set(),
        Convolutions: set(),
        Attention: {"encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "recurrence"},
        TokensFirst: {""},  # the module around it that is given rows of samples: all of the model
        Tied: set(),
        Normed: set(),
    }
    for kind, names in expected.items():
        base, tuned, inputs = setting(kind)
        vectors = weights.task_vectors(base, *tuned)
        weights.forward(base, inputs, vectors, draw(vectors))
        assert found_apart(base) == names, kind


@pytest.mark.parametrize("kind", [Vision, Tied])
@pytest.mark.parametrize("way", ["auto", "merge", "low_rank"])
def test_low_rank_is_exact_of_its_vectors(kind, way):
    base, tuned, inputs = setting(kind)
    low = weights.task_vectors(base, *tuned).low_rank(2)
    assert low.factors
    c = draw(low)
    for t, one in enumerate(tuned):
        for name, p in one.named_parameters():
            p.data = base.get_parameter(name).data + low.whole(name)[t]
    with torch.no_grad():
        assert off(weights.forward(base, inputs, low, c, way=way), by_hand(base, tuned, inputs, c)) <= 1e-12


@pytest.mark.parametrize("batch", [1, 2, SAMPLES - 1, SAMPLES, SAMPLES + 1, 2 * SAMPLES + 3])
def test_batches_that_are_no_multiple_of_a_chunk(batch):
    base, tuned, _ = setting(Vision)
    inputs = torch.randn(batch, 3, 12, 12, dtype=torch.float64)
    vectors = weights.task_vectors(base, *tuned)
    c = draw(vectors, batch)
    with torch.no_grad():
        got = weights.forward(base, inputs, vectors, c, way="merge")
        assert off(got, by_hand(base, tuned, inputs, c)) <= 1e-12


@pytest.mark.parametrize("tile", [1, 7, 48, 1000])
@pytest.mark.parametrize("tokens", [1, 5, products.TOKENS])
@pytest.mark.parametrize("rows_in", [False, True])
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])  # of outputs up to 60
def test_tiles_of_any_size(monkeypatch, tile, tokens, rows_in, low, dtype, limit):
    """Also over a buffer that holds what was there before."""
    monkeypatch.setattr(products, "TILE", tile)
    monkeypatch.setattr(products, "ROWS", 3)
    draw = torch.Generator().manual_seed(0)
    x, c = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((19, tokens, 7), (19, 3)))
    size = (7, 5) if rows_in else (5, 7)
    weight, left, right = (
        torch.randn(*s, generator=draw, dtype=torch.float64) for s in (size, (3, size[0], 2), (3, 2, size[1]))
    )
    merged = weight + torch.einsum("bt,trc->brc", c, left @ right)
    want = x @ (merged if rows_in else merged.mT)
    x, weight, left, right, c = (tensor.to(dtype) for tensor in (x, weight, left, right, c))
    delta = (left, right) if low else left @ right
    for way in ("merge", "low_rank" if low else "wide"):
        got = products.product(x, weight, delta, c, rows_in, way).double()
        torch.testing.assert_close(got, want, atol=limit, rtol=0)


@pytest.mark.parametrize("blocks", ["layer", "model"])
def test_blocks(blocks):
    base, tuned, inputs = setting(Tied)
    vectors = weights.task_vectors(base, *tuned)
    c = draw(vectors, blocks=blocks)
    names = vectors.blocks(blocks)
    layers = {"table.weight": "table", "matrix": "matrix", "queries": "queries", "read.weight": "read"}
    layers |= {"read.bias": "read", "out.bias": "out"}
    assert names == (["model"] if blocks == "model" else ["matrix", "queries", "table", "read", "out"])
    each = [names.index("model" if blocks == "model" else layers[name]) for name in vectors.shapes]
    with torch.no_grad():
        want = by_hand(base, tuned, inputs, c[:, :, each])
        assert off(weights.forward(base, inputs, vectors, c, blocks=blocks), want) <= 1e-12


@networks
def test_one_merge(kind):
    base, tuned, inputs = setting(kind)
    vectors = weights.task_vectors(base, *tuned)
    c = draw(vectors)[0]
    with torch.no_grad():
        want = by_hand(base, tuned, inputs, c.expand(len(inputs), -1, -1))
        assert off(weights.forward(base, inputs, vectors, c), want) <= 1e-12
        with weights.merged(base, vectors, c):
            assert off(base(inputs), want) <= 1e-12


def test_one_vector_alone():
    base, tuned, inputs = setting(Vision, count=1)
    vectors = weights.task_vectors(base, *tuned)
    with torch.no_grad():
        got = weights.forward(base, inputs, vectors, torch.ones(7, 1, len(vectors.blocks()), dtype=torch.float64))
        assert off(got, tuned[0](inputs)) <= 1e-12


def test_several_calls_in_a_row():
    """Other lengths, batches, coefficients, vectors: what was found for one is not taken for another."""
    base, tuned, _ = setting(Tied)
    both = weights.task_vectors(base, *tuned), weights.task_vectors(base, *tuned[:1])
    with torch.no_grad():
        for batch, tokens, one in [(7, 4, 0), (4, 4, 0), (4, 7, 1), (3, 3, 0), (7, 4, 1), (6, 6, 0), (2, 3, 0)]:
            ids, c = torch.randint(11, (batch, tokens)), draw(both[one], batch)
            some = tuned if one == 0 else tuned[:1]
            assert off(weights.forward(base, ids, both[one], c), by_hand(base, some, ids, c)) <= 1e-12


def test_what_is_found_is_found_once():
    base, tuned, inputs = setting(Attention)
    vectors = weights.task_vectors(base, *tuned)
    runs = []
    handle = base.register_forward_pre_hook(lambda *_: runs.append(1))
    for _ in range(3):
        weights.forward(base, inputs, vectors, draw(vectors))
    handle.remove()
    assert len(runs) > 5
    counted = len(runs)
    handle = base.register_forward_pre_hook(lambda *_: runs.append(1))
    weights.forward(base, inputs, vectors, draw(vectors))
    handle.remove()
    assert len(runs) == counted + 1
    base.encoder.layers[0].norm_first = True  # another model
    with torch.no_grad():
        for one in tuned:
            one.encoder.layers[0].norm_first = True
        want = by_hand(base, tuned, inputs, draw(vectors))
        assert off(weights.forward(base, inputs, vectors, draw(vectors)), want) <= 1e-12


class Blind(nn.Module):
    """Its samples see each other: no way but one by one is right."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) + self.inner(x).mean(dim=0)


def test_what_is_not_exact_for_many_runs_sample_by_sample_and_is_said():
    base = Blind().double()
    vectors = weights.task_vectors(base, Blind().double())
    x, c = torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 1, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="Blind with weights for each sample is not exact for many"):
        got = weights.forward(base, x, vectors, c)
    assert off(got, weights.naive.forward(base, x, vectors, c)) <= 1e-12


def test_samples_that_are_all_the_same_are_told_apart():
    base, tuned, inputs = setting(TokensFirst)
    inputs = torch.ones_like(inputs)
    vectors = weights.task_vectors(base, *tuned)
    c = draw(vectors)
    with torch.no_grad(), pytest.warns(UserWarning, match="not exact"):
        got = weights.forward(base, inputs, vectors, c)
    assert off(got, by_hand(base, tuned, inputs, c)) <= 1e-12


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that anything makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(answer) if isinstance(x, torch.Tensor)]
        self.most = max([self.most, *(x.untyped_storage().nbytes() // x.itemsize for x in made)])
        return answer


@pytest.mark.parametrize("graph", [False, True])
def test_no_memory_for_samples_times_weights(graph):
    base = nn.Sequential(nn.Embedding(4000, 500), nn.Linear(500, 600), nn.LayerNorm(600), nn.Linear(600, 4000))
    vectors = weights.task_vectors(base, nn.Sequential(*(type(m)(*size) for m, size in zip(base, SIZES, strict=True))))
    ids, c = torch.randint(4000, (40, 2)), torch.rand(40, 1, len(vectors.blocks())).requires_grad_(graph)
    weights.forward(base, ids, vectors, c, way="merge")  # what is looked for takes a merge a sample, of three
    kept = []
    noting = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.untyped_storage().nbytes()) or x, lambda x: x
    )
    with Largest() as seen, noting:
        answer = weights.forward(base, ids, vectors, c, way="merge")
        if graph:
            answer.square().sum().backward()
    # Weights and vectors are 4000 x 600 numbers, the answer 40 x 2 x 4000; 40 matrices would be 96 million.
    assert seen.most <= max(4000 * 600, SAMPLES * TILE)
    assert max(kept, default=0) <= 4 * 4000 * 600


SIZES = [(4000, 500), (500, 600), (600,), (600, 4000)]


def test_training_mode_and_dropout():
    base, tuned, inputs = setting(Vision)
    base = nn.Sequential(base, nn.Dropout(0.5)).train()
    vectors = weights.task_vectors(base, *(nn.Sequential(one, nn.Dropout(0.5)) for one in tuned))
    c = draw(vectors)
    got = weights.forward(base, inputs, vectors, c)
    assert base.training
    assert (got == 0).any()
    with torch.no_grad():
        assert off(got, 2 * (got != 0) * by_hand(base[0], tuned, inputs, c)[0]) <= 1e-12


def test_inference_mode():
    base, tuned, inputs = setting(Attention)
    vectors = weights.task_vectors(base, *tuned)
    with torch.inference_mode():
        got = weights.forward(base, inputs, vectors, draw(vectors))
        assert off(got, by_hand(base, tuned, inputs, draw(vectors))) <= 1e-12


def test_answers_of_several_parts():
    base, tuned, inputs = setting(Tied)
    vectors = weights.task_vectors(base, *tuned)
    logits, more = weights.forward(base, inputs, vectors, draw(vectors))
    assert logits.shape == (7, 3, 11)
    assert set(more) == {"more"}
    assert len(leaves((logits, more))) == 2


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x, more):
        more = more["scale"][0] if isinstance(more, dict) else more
        return self.inner(x) * more


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("verb", [weights.forward, weights.naive.forward])
def test_arrays_among_inputs(verb, single):
    base = Two()
    vectors = weights.task_vectors(base, Two())
    x, more, c = torch.randn(5, 4), torch.randn(5, 3), draw(vectors, 5, dtype=torch.float32)
    c = c[0] if single else c
    want = verb(base, {"x": x, "more": more}, vectors, c)
    for given in (more.numpy(), {"scale": [more.numpy()]}):
        assert torch.equal(verb(base, {"x": x.numpy(), "more": given}, vectors, c), want)
    with pytest.raises(TypeError, match="input 'more' must be numbers"):
        verb(base, {"x": x, "more": more.numpy().astype(str)}, vectors, c)
