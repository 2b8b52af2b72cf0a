"""The classifier follows its definition, votes as said where there are ties, and tells real word relations apart."""

import math
import random as pythons

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

import engine
import models
from bench.families import wrapped
from engine import tasks
from engine.methods import sav
from engine.methods.sav import SparseAttentionVectors

PROMPTS = ["Q: hot\nA:", "Q: big\nA:", "good", "bad day", "Q: x\nA: y", "three words here", "a", "zz top"]
LABELS = ["question", "question", "other", "other", "question", "other", "other", "other"]


def naive_fit(model, prompts, labels, heads):
    """One prompt, one head, one class at a time: [(layer, head)], {class: [mean of each]}."""
    classes = sorted(set(labels))
    z = [engine.capture(model, [prompt])[0].float() for prompt in prompts]
    means, right = {}, {}
    for layer in range(model.shape.n_layers):
        for head in range(model.shape.n_heads):
            for c in classes:
                own = [x[layer, head] for x, label in zip(z, labels, strict=True) if label == c]
                means[c, layer, head] = sum(own) / len(own)
            votes = [naive_vote(x, means, classes, layer, head) for x in z]
            right[layer, head] = sum(vote == label for vote, label in zip(votes, labels, strict=True))
    kept = sorted(right, key=lambda at: (-right[at], at))[:heads]
    return kept, means


def naive_vote(x, means, classes, layer, head):
    return max(classes, key=lambda c: cosine_similarity(x[layer, head], means[c, layer, head], dim=0).item())


def naive_predict(model, prompt, kept, means, classes):
    x = engine.capture(model, [prompt])[0].float()
    votes = [naive_vote(x, means, classes, *at) for at in kept]
    most = max(votes.count(c) for c in classes)
    return next(vote for vote in votes if votes.count(vote) == most), votes


@pytest.mark.parametrize("heads", [1, 4, 18])
@pytest.mark.parametrize("labels", [LABELS, [0, 0, 7, 7, 3, 3, 7, 7]])
def test_against_the_definition(model, heads, labels):
    classes = sorted(set(labels))
    classifier = SparseAttentionVectors(model, heads)
    assert classifier.fit(PROMPTS, labels) is classifier
    kept, means = naive_fit(model, PROMPTS, labels, heads)
    assert classifier.heads_ == kept
    assert classifier.classes_.tolist() == classes
    for i, at in enumerate(kept):
        for j, c in enumerate(classes):
            assert torch.allclose(classifier.means_[j, i], means[c, *at], atol=1e-6)
    new = ["Q: old\nA:", "nothing", "Q: hot\nA:", "what?"]
    predicted, shares = classifier.predict(new), classifier.predict_proba(new)
    for i, prompt in enumerate(new):
        want, votes = naive_predict(model, prompt, kept, means, classes)
        assert predicted[i] == want
        assert shares[i].tolist() == pytest.approx([votes.count(c) / heads for c in classes])
    assert classifier.score(new, predicted) == 1
    assert (
        classifier.score(new, [predicted[0], *([classes[-1]] * 3)])
        == np.mean(predicted[1:] == classes[-1]) * 0.75 + 0.25
    )


def planted(model, informative, n=12, noise=0.05, classes=2):
    """The z of prompts where some heads point the way of their class, and all others any way."""
    s = model.shape
    g = torch.Generator().manual_seed(4)
    z = torch.randn(n, s.n_layers, s.n_heads, s.head_dim, generator=g)
    target = torch.arange(n) % classes
    for layer, head in informative:
        directions = torch.randn(classes, s.head_dim, generator=g)
        z[:, layer, head] = directions[target] + noise * z[:, layer, head]
    z *= torch.rand(n, s.n_layers, s.n_heads, 1, generator=g) * 9 + 0.1  # lengths play no part
    return z, [f"class {int(i)}" for i in target]


def test_finds_the_planted_heads(model):
    informative = [(0, 5), (1, 2), (2, 0)]
    z, y = planted(model, informative, n=40, classes=4)
    classifier = SparseAttentionVectors(model, heads=3).fit(z[:24], y[:24])
    assert classifier.heads_ == informative
    assert classifier.accuracies_[tuple(torch.tensor(informative).T)].tolist() == [1, 1, 1]
    assert (classifier.accuracies_ < 1).sum() == 15
    assert classifier.score(z[24:], y[24:]) == 1
    assert (classifier.predict_proba(z[24:]).max(axis=1) == 1).all()


def test_z_and_prompts_are_one(model, monkeypatch):
    z = engine.capture(model, PROMPTS)
    one, other = (SparseAttentionVectors(model, 5).fit(X, LABELS) for X in (z, PROMPTS))
    assert one.heads_ == other.heads_
    assert torch.equal(one.means_, other.means_)
    assert np.array_equal(one.predict_proba(z), other.predict_proba(PROMPTS))
    monkeypatch.setattr(sav, "AT_ONCE", 3)
    assert np.array_equal(one.predict_proba(z), other.predict_proba(PROMPTS))


def axis(model, *directions):
    """One prompt whose heads (0, 0), (0, 1), ... point along these axes, either way; all other heads are silent."""
    s = model.shape
    z = torch.zeros(1, s.n_layers, s.n_heads, s.head_dim)
    for head, direction in enumerate(directions):
        z[0, 0, head, abs(direction)] = math.copysign(1, direction)
    return z


def test_ties(model):
    """Heads that are equally good: the first. Votes that are equally many: the best head's class."""
    # Heads (0, 1) and (0, 3) are always right, (0, 0) and (0, 2) on three prompts of four, silent ones on two.
    X = torch.cat([axis(model, 1, 1, 1, 1), axis(model, 2, 1, 2, 1), axis(model, 2, 2, 2, 2), axis(model, 2, 2, 2, 2)])
    y = ["a", "a", "b", "b"]
    classifier = SparseAttentionVectors(model, 5).fit(X, y)
    assert classifier.heads_ == [(0, 1), (0, 3), (0, 0), (0, 2), (0, 4)]
    assert classifier.accuracies_[0, :5].tolist() == [0.75, 1, 0.75, 1, 0.5]
    assert classifier.predict_proba(axis(model)).tolist() == [[1, 0]]  # silent heads are as near to either class
    even = SparseAttentionVectors(model, 4).fit(X, y)
    split = [axis(model, 1, 2, 1, 2), axis(model, 2, 1, 2, 1), axis(model, 1, 1, 2, 2), axis(model, 2, 2, 1, 1)]
    assert even.predict_proba(torch.cat(split)).tolist() == [[0.5, 0.5]] * 4
    assert even.predict(torch.cat(split)).tolist() == ["b", "a", "a", "b"]


def test_order_of_the_prompts_does_not_matter(model):
    z, y = planted(model, [(1, 1), (2, 3)], noise=2.0)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).tolist()
    one = SparseAttentionVectors(model, 6).fit(z, y)
    other = SparseAttentionVectors(model, 6).fit(z[order], [y[i] for i in order])
    assert one.heads_ == other.heads_
    assert torch.allclose(one.means_, other.means_, atol=1e-6)


@pytest.mark.parametrize("labels", [LABELS, [5, 5, -1, -1, 5, -1, -1, -1]])
def test_round_trip(model, tmp_path, labels):
    classifier = SparseAttentionVectors(model, 4).fit(PROMPTS, labels)
    classifier.save(tmp_path / "new" / "sav.safetensors")
    loaded = SparseAttentionVectors.load(tmp_path / "new" / "sav.safetensors", model)
    assert loaded.heads == 4
    assert loaded.heads_ == classifier.heads_
    assert loaded.classes_.dtype == classifier.classes_.dtype
    for name in ("means_", "accuracies_"):
        assert torch.equal(getattr(loaded, name), getattr(classifier, name))
    assert np.array_equal(loaded.predict(PROMPTS), classifier.predict(PROMPTS))


def test_parameters(model, tiny):
    classifier = SparseAttentionVectors(model)
    assert classifier.get_params() == {"model": model, "heads": 20}
    assert classifier.set_params(heads=3) is classifier
    clone = SparseAttentionVectors(**classifier.get_params())
    assert (clone.model, clone.heads) == (model, 3)
    assert clone.set_params(model=tiny("gpt2")).model.name == "tiny-gpt2"
    assert repr(classifier) == "SparseAttentionVectors(tiny-llama, heads=3)"


def test_with_scikit_learn(model):
    base = pytest.importorskip("sklearn.base")
    selection = pytest.importorskip("sklearn.model_selection")
    z, y = planted(model, [(1, 1)], n=16)
    classifier = SparseAttentionVectors(model, 18)
    assert base.clone(classifier).model is model
    search = selection.GridSearchCV(classifier, {"heads": [1, 18]}, cv=4).fit(z, y)
    assert search.best_params_ == {"heads": 1}
    assert search.best_score_ == 1
    assert len(selection.cross_val_score(classifier, PROMPTS, LABELS, cv=3)) == 3


@pytest.mark.parametrize("family", ["qwen3", "unpacked"])
def test_families(tiny, family):
    """Grouped heads, heads wider than d_model / H, and rows that are not packed."""
    other = tiny(family)
    kept, _ = naive_fit(other, PROMPTS, LABELS, 5)
    assert SparseAttentionVectors(other, 5).fit(PROMPTS, LABELS).heads_ == kept


def test_half_precision():
    """Means and cosines in float32, whatever the model computes in."""
    half = wrapped("llama", dtype=torch.bfloat16)
    classifier = SparseAttentionVectors(half, 5).fit(PROMPTS, LABELS)
    assert classifier.means_.dtype == torch.float32
    assert classifier.heads_ == naive_fit(half, PROMPTS, LABELS, 5)[0]


def test_images():
    """Prompts that differ in nothing but their picture."""
    model = wrapped("llava")
    g = torch.Generator().manual_seed(0)

    def prompt(dark):
        pixels = torch.randint(0, 60, (28, 28, 3), generator=g) + (0 if dark else 190)
        return models.Prompt("<image> Is it dark?\nA:", (Image.fromarray(pixels.byte().numpy()),))

    labels = ["dark", "light"] * 4
    X = [prompt(label == "dark") for label in labels]
    classifier = SparseAttentionVectors(model, 3).fit(X, labels)
    assert classifier.score([prompt(True), prompt(False)] * 3, ["dark", "light"] * 3) == 1


@pytest.fixture(scope="module")
def opposites(smollm2):
    """Are they opposites? Pairs of the antonym list, and pairs put together from two of them: z and labels of 60 each.

    No word tells the class by itself, as both sides of both classes are drawn from the same lists.
    """
    pairs = list(tasks.load("antonyms").pairs)
    pythons.Random(0).shuffle(pairs)
    real, mixed = pairs[:50], pairs[50:100]
    mixed = [tasks.Pair(one.input, other.output) for one, other in zip(mixed, mixed[1:] + mixed[:1], strict=True)]
    X = [f"Q: {a}\nA: {b}" for both in zip(real, mixed, strict=True) for a, b in both]
    return engine.capture(smollm2, X), ["opposites", "no opposites"] * 50


def test_tells_opposites_on_held_out_words(smollm2, opposites):
    """20 examples of each class, 60 held-out prompts: chance is 0.5, its standard deviation 0.065."""
    z, y = opposites
    classifier = SparseAttentionVectors(smollm2).fit(z[:40], y[:40])
    assert len(classifier.heads_) == 20
    assert classifier.score(z[40:], y[40:]) > 0.5 + 4 * 0.065


def test_learns_nothing_where_there_is_nothing(smollm2, opposites):
    """The same prompts with labels drawn at random: every head looks good on what it was chosen by, none elsewhere."""
    z, y = opposites
    scores = []
    for seed in range(5):
        labels = y[:]
        pythons.Random(seed).shuffle(labels)
        classifier = SparseAttentionVectors(smollm2).fit(z[:40], labels[:40])
        assert classifier.accuracies_.max() > 0.7
        scores.append(classifier.score(z[40:], labels[40:]))
    assert abs(sum(scores) / 5 - 0.5) < 4 * 0.065 / 5**0.5
