"""The soft gate is the patch where it is hard, its gradient that of hooked forwards; estimates agree on average."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import engine
import models
from engine.methods.estimators import ESTIMATORS, gate_gradients, gated, gated_logits, leave_one_out
from engine.methods.mtv import PRESETS, Search
from models import zoo

PROMPTS = ["Q: hot\nA:", "Q: a longer one\nA:", "x"]
TARGETS = [5, 7, 9]
ANSWERS = [[5], [7], [9]]
FAMILY = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "unpacked"])


def prefixes(model):
    pool = engine.PrefixPool(model, PROMPTS)
    return [pool[i] for i in range(len(pool))]


def means_of(model):
    s = model.shape
    return torch.randn(s.n_layers, s.n_heads, s.head_dim, generator=torch.Generator().manual_seed(4))


def hooked_loss(model, prompt, target, gates, means):
    """By a hooked forward of the whole prompt: nothing shared, nothing packed."""
    logits = model.forward(model.encode(prompt)[None], gated(model, gates[None], means))
    return cross_entropy(logits.float(), torch.tensor([target])).item()


@FAMILY
def test_hard_gates_are_the_patch(tiny, draw, family):
    """Gates of 0 and 1: exactly the logits of masks, bit for bit where the same pass computes them."""
    model = tiny(family)
    masks, means = draw(model, rows=4)
    with torch.no_grad():
        found = gated_logits(model, prefixes(model), masks.float().expand(3, -1, -1, -1), means)
    want = engine.naive.patch(model, PROMPTS, heads=masks, values=means)
    assert (found - want).abs().max() < 1e-5 * want.abs().max()
    unpatched = engine.naive.patch(model, PROMPTS, heads=None, values=None)
    assert (want - unpatched).abs().max() > 1e-2  # the patch does something


@FAMILY
def test_gradients_are_differences(tiny, family):
    """Central differences of hooked forwards in float64's stead: every gate of one layer, and some of the others."""
    model = tiny(family)
    means = means_of(model)
    gates = torch.rand(3, 2, *means.shape[:2], generator=torch.Generator().manual_seed(1))
    losses, gradients = gate_gradients(model, prefixes(model), ANSWERS, gates, means)
    step, checked = 1e-2, []
    for p, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        for r in range(2):
            assert losses[p, r].item() == pytest.approx(
                hooked_loss(model, prompt, target, gates[p, r], means), abs=1e-5
            )
        for layer, head in ((0, 0), (1, 3), (2, 1)):
            moved = [gates[p, 1].clone() for _ in range(2)]
            moved[0][layer, head] += step
            moved[1][layer, head] -= step
            up, down = (hooked_loss(model, prompt, target, one, means) for one in moved)
            checked.append(((up - down) / (2 * step), gradients[p, 1, layer, head].item()))
    want, got = torch.tensor(checked).T
    assert want.abs().max() > 1e-3
    assert (got - want).abs().max() < 0.02 * want.abs().max()


@FAMILY
def test_the_model_is_left_alone(tiny, family):
    """No gradients of the weights are made, none that were there change, and the caller's own mode is back."""
    model = tiny(family)
    means = means_of(model)
    weights = list(model.hf.parameters())
    before = [(weight.grad, weight.requires_grad) for weight in weights]
    weights[0].grad = mark = torch.ones_like(weights[0])
    try:
        with torch.no_grad():
            gate_gradients(model, prefixes(model), ANSWERS, torch.full((3, 1, *means.shape[:2]), 0.3), means)
            assert not torch.is_grad_enabled()
        assert torch.equal(weights[0].grad, torch.ones_like(mark))
        weights[0].grad = before[0][0]
        for weight, (grad, required) in zip(weights, before, strict=True):
            assert weight.grad is grad
            assert weight.requires_grad == required
    finally:
        weights[0].grad = before[0][0]


def test_frozen_weights(model):
    """The gates alone require a gradient."""
    frozen = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="frozen")
    frozen.hf.requires_grad_(False)
    gates, means = torch.full((3, 1, 3, 6), 0.3), means_of(model)
    found = gate_gradients(frozen, prefixes(frozen), ANSWERS, gates, means)[1]
    want = gate_gradients(model, prefixes(model), ANSWERS, gates, means)[1]
    assert want.abs().max() > 0
    assert torch.allclose(found, want, atol=1e-6)


def test_a_model_without_gradients(monkeypatch):
    model = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="quantised")
    pack = model.pack
    monkeypatch.setattr(model, "pack", lambda *args, **options: torch.no_grad()(pack)(*args, **options))
    with pytest.raises(models.UnsupportedModelError, match="quantised records no gradients"):
        gate_gradients(model, prefixes(model), ANSWERS, torch.full((3, 1, 3, 6), 0.3), means_of(model))


def test_leave_one_out():
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert leave_one_out(losses).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5]


def exact_gradient(p, loss):
    """Of E[loss(lambda)] with respect to p, by all masks of a few heads."""
    p = p.clone().requires_grad_()
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * p.numel()).view(-1, *p.shape)
    chance = torch.where(masks.bool(), p, 1 - p).flatten(1).prod(dim=1)
    return torch.autograd.grad((chance * torch.stack([loss(m) for m in masks])).sum(), p)[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_point_the_right_way(estimator):
    """On a loss that is linear in the mask all four agree on average with the exact gradient; theta takes Adam's step.

    The paper's preset: its reinforce is unbiased, the reference's divides by the standard deviation.
    """
    made = Search(PRESETS["paper"], (2, 2), lr=0.1, seed=0, estimator=estimator)
    slope = torch.tensor([[1.0, -2.0], [0.5, 0.0]])

    def loss(mask):
        return 3 + (slope * mask).sum(dim=(-2, -1))

    p = made.probabilities()
    want = exact_gradient(p, loss) * p * (1 - p)  # with respect to theta
    if estimator in ("reinforce", "leave_one_out"):
        masks = made.draw(200_000)
        made.update(masks, loss(masks.float()))
    else:
        gates = made.draw_gates(4, 1)
        made.follow(slope, loss(gates))
    assert torch.allclose(made.adam.state[made.theta]["exp_avg"], 0.1 * want, atol=3e-3)


def test_leave_one_out_varies_less():
    """Its reason to be: the mean of the plain estimate, without what the common level of the loss adds."""
    moved = {}
    for estimator in ("reinforce", "leave_one_out"):
        steps = []
        for seed in range(200):
            made = Search(PRESETS["paper"], (2, 2), 0.1, 0, estimator)
            made.random.manual_seed(seed)
            masks = made.draw(8)
            made.update(masks, 3 + masks[:, 0, 0].float())
            steps.append(made.adam.state[made.theta]["exp_avg"])
        moved[estimator] = torch.stack(steps)
    assert moved["leave_one_out"].var(dim=0).sum() < moved["reinforce"].var(dim=0).sum() / 2


def test_gates_are_drawn_alike():
    straight, relaxed = (Search(PRESETS["reference"], (3, 6), 0.1, 0, e) for e in ("straight_through", "relaxed"))
    gates = straight.draw_gates(4, 500)
    assert gates.unique().tolist() == [0, 1]
    assert (gates.mean(dim=(0, 1)) - straight.probabilities()).abs().max() < 0.05
    assert torch.equal(relaxed.draw_gates(4, 1), relaxed.probabilities().expand(4, 1, 3, 6))
