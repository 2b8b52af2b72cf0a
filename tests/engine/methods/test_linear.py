"""Linear task vectors: the closed form is least squares by hand, what it does to a prompt that of a plain hook."""

import pytest
import torch

import engine
from engine import Example
from engine.methods import linear
from engine.methods.linear import LinearVector, regress
from tests import plain

FAMILY = pytest.mark.parametrize("family", ["llama", "gpt2"])
ASKED = [f"Q: {'ab' * n}\nA:" for n in range(1, 8)]
SHOWN = [f"Q: {letter}\nA: {letter}\n\n{prompt}" for letter, prompt in zip("qrstuvw", ASKED, strict=True)]


def states(hf, family, model, prompts):
    """After every block at the last token, by hooks: [prompts, layers, d_model]."""
    found = [
        plain.activations(hf, family, model.encode(one), ["resid_post"])["resid_post"][:, -1, 0] for one in prompts
    ]
    return torch.stack(found).detach()


def by_hand(x, y, penalty):
    """Ridge regression with a mean, as least squares of one taller system."""
    xm, ym = x.mean(dim=0), y.mean(dim=0)
    tall = torch.cat([x - xm, penalty**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    aim = torch.cat([y - ym, torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype)])
    weights = torch.linalg.lstsq(tall, aim).solution
    return lambda new: (new - xm) @ weights + ym


def unit(x):
    """The mean squared norm of a centred state."""
    return (x - x.mean(dim=0)).square().sum(dim=1).mean().item()


@pytest.mark.parametrize(("questions", "width"), [(6, 10), (30, 4)])
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
def test_closed_form(random, questions, width, ridge):
    x, y, new = (torch.randn(n, width, generator=random, dtype=torch.float64) for n in (questions, questions, 5))
    vector = LinearVector(0, *regress(x, y, ridge))
    want = by_hand(x, y, ridge * unit(x))
    assert torch.allclose(vector(new), want(new), atol=1e-5)
    plain_least_squares = by_hand(x, y, 0.0)
    if questions > width:
        assert torch.allclose(LinearVector(0, *regress(x, y, 1e-12))(new), plain_least_squares(new), atol=1e-5)


def test_the_ridge_of_the_least_leave_one_out_error(random):
    """As if every question had been left out, one after the other, and the rest fitted."""
    for noise in (0.01, 3.0):
        x = torch.randn(12, 5, generator=random, dtype=torch.float64)
        y = x @ torch.randn(5, 5, generator=random, dtype=torch.float64)
        y = y + noise * torch.randn(12, 5, generator=random, dtype=torch.float64)
        errors = {}
        for ridge in linear.RIDGES:
            errors[ridge] = 0.0
            for out in range(12):
                rest = [i for i in range(12) if i != out]
                found = by_hand(x[rest], y[rest], ridge * unit(x))
                errors[ridge] += (found(x[out]) - y[out]).square().sum().item()
        best = min(errors, key=errors.get)
        assert torch.equal(regress(x, y)[3], regress(x, y, best)[3])


def test_states_that_are_all_alike():
    """Nothing to regress on: the mean is what they become."""
    y = torch.arange(6.0).view(3, 2)
    assert LinearVector(0, *regress(torch.ones(3, 2), y))(torch.zeros(2)).tolist() == [2.0, 3.0]


@FAMILY
def test_it_is_what_hooks_find_and_do(tiny, family):
    """States by hooks, weights by least squares, applied by a hook: the logits are the engine's."""
    model, hf, layer = tiny(family), plain.made(family), 1
    vector = linear.extract(model, SHOWN, [Example(one, " c") for one in ASKED], layer=layer, ridge=0.1, progress=False)
    x, y = (states(hf, family, model, some)[:, layer].double() for some in (ASKED, SHOWN))
    becomes = by_hand(x, y, 0.1 * unit(x))

    def change(h):
        return torch.cat([h[:-1], becomes(h[-1:].double()).float()])

    want = plain.logits(hf, family, model.encode("Q: new\nA:"), [("resid_post", layer, change)])
    got = engine.patch(model, "Q: new\nA:", vector.patch)
    assert torch.allclose(got[0], want, atol=2e-5)
    without = engine.patch(model, "Q: new\nA:")
    assert (got - without).abs().max() > 1e-2


@FAMILY
def test_the_layer_of_the_least_distance(tiny, family):
    """On the last questions, not fitted on: the distance at every layer by plain hooks."""
    model, hf = tiny(family), plain.made(family)
    vector = linear.extract(model, SHOWN, ASKED, ridge=1.0, progress=False)
    x, y = (states(hf, family, model, some).double() for some in (ASKED, SHOWN))
    distances = []
    for layer in range(3):
        becomes = by_hand(x[:5, layer], y[:5, layer], unit(x[:5, layer]))
        found = []
        for i in (5, 6):
            changes = [("resid_post", layer, lambda h, f=becomes: torch.cat([h[:-1], f(h[-1:].double()).float()]))]
            said = plain.logits(hf, family, model.encode(ASKED[i]), changes).softmax(dim=-1)
            wanted = plain.logits(hf, family, model.encode(SHOWN[i])).softmax(dim=-1)
            found.append((said - wanted).abs().sum().item() / 2)
        distances.append(sum(found) / 2)
    assert vector.metadata["distances"] == pytest.approx(distances, abs=1e-5)
    assert vector.layer == min(range(3), key=distances.__getitem__)
    assert vector.metadata["questions"] == 5


@FAMILY
def test_distance(tiny, draw, family):
    """Of any rows: half the sum of differences between what plain forwards say."""
    model, hf = tiny(family), plain.made(family)
    masks, values = draw(model, rows=3)
    got = linear.distance(model, ASKED[:3], SHOWN[:3], heads=masks, values=values)
    for i in range(3):
        wanted = plain.logits(hf, family, model.encode(SHOWN[i])).softmax(dim=-1)
        for row in range(3):
            changes = plain.patched("z", masks[row], values[None])
            said = plain.logits(hf, family, model.encode(ASKED[i]), changes).softmax(dim=-1)
            assert got[i, row].item() == pytest.approx((said - wanted).abs().sum().item() / 2, abs=1e-5)
    assert linear.distance(model, SHOWN, SHOWN).abs().max() < 1e-6
    assert 0 < linear.distance(model, ASKED, SHOWN).min() <= linear.distance(model, ASKED, SHOWN).max() <= 1


def test_saved_and_generated(model, tmp_path):
    vector = linear.extract(model, SHOWN, ASKED, progress=False)
    vector.save(tmp_path / "linear.safetensors")
    loaded = LinearVector.load(tmp_path / "linear.safetensors", model)
    assert (loaded.layer, loaded.metadata) == (vector.layer, vector.metadata)
    for part in ("before", "after", "down", "up"):
        assert torch.equal(getattr(loaded, part), getattr(vector, part))
    answers = [engine.generate(model, ASKED[0], one.patch, max_new_tokens=4) for one in (vector, loaded)]
    assert answers[0] == answers[1]
