"""VTVC: the objective written out a second time, with scipy's normal and one merged model a sample; its gradients by
finite differences; what is fitted is reproducible, resumable to the bit, and does what each kind says.
"""

import math
from copy import deepcopy

import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.func import functional_call

import engine
from engine.methods.posterior import Constants, Posterior

KINDS = ("gated", "spike_and_slab", "gaussian", "deterministic", "shared")
# psi1 is moved off its start, where the clamp of the exploration term would kill its gradient.
MOVED = torch.tensor([0.08, 0.7]).double().log()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 4)

    def forward(self, x):
        return self.outer(self.norm(self.inner(x).tanh()))


@pytest.fixture
def setting():
    """A base, two models finetuned from it, samples, answers."""
    torch.manual_seed(0)
    base = Network().double()
    tuned = [deepcopy(base) for _ in range(2)]
    for one in tuned:
        for p in one.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return base, tuned, torch.randn(9, 5).double(), torch.randint(4, (9,))


def posterior(kind, names=("a", "b"), blocks=6, width=4):
    made = Posterior(kind, names, tuple(f"block {i}" for i in range(blocks)), width, Constants(), 3, torch.float64)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name == "log_psi":
                p.copy_(MOVED)
            elif name != "shared":
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).double()
    return made


def kl_by_hand(mu, sigma):
    return (sigma**2 + mu**2 - 1) / 2 - math.log(sigma)


def by_hand(made, h, eps):
    """Coefficients and terms of the gated posterior, number by number, in Python."""
    psi1, psi2 = (float(x) for x in made.log_psi.detach().exp())
    mu, sigma = (x.detach().tolist() for x in (made._of(made.mean, h), made._sigma(h)))
    found, terms, n = (
        torch.zeros(eps.shape).double(),
        dict.fromkeys(("kl", "boundary", "uncertainty"), 0.0),
        eps.numel(),
    )
    for b, t, i in torch.cartesian_prod(*(torch.arange(k) for k in eps.shape)).tolist():
        m, s = mu[b][t][i], sigma[b][t][i]
        u = math.tanh(s / (abs(m) + 1e-8))
        bound = psi1 * (1 + psi2 * u)
        z = m + s * float(eps[b, t, i])
        g = 1 / (1 + math.exp(-20 * (abs(z) - bound)))
        q = norm.sf(bound, m, s) + norm.cdf(-bound, m, s)
        found[b, t, i] = z * g
        rest = norm.cdf(bound, m, s) - norm.cdf(-bound, m, s)
        bernoulli = q * math.log(q / 0.5) + (rest * math.log(rest / 0.5) if rest > 0 else 0)
        terms["kl"] += 0.1 * (bernoulli + q * kl_by_hand(m, s)) / n
        terms["boundary"] += 1e-4 * max(0, 1 - abs(abs(m) - bound) / 0.1) / n
        terms["uncertainty"] += 1e-2 * g * u / n
    terms["exploration"] = -1e-3 * (math.log(abs(psi1 - 0.05)) + math.log(abs(psi2 - 1.0)))
    return found, terms


def test_objective_is_the_formulas():
    made, h = posterior("gated"), torch.randn(3, 4).double()
    drawn = made.draw(h, torch.Generator().manual_seed(5))
    eps = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found, terms = by_hand(made, h, eps)
    assert (drawn.coefficients - found).abs().max() <= 1e-12
    got = dict(drawn.terms)
    got["kl"] = got.pop("kl_gate") + got.pop("kl_slab")
    assert got.keys() == terms.keys()
    for name, want in terms.items():
        assert got[name].item() == pytest.approx(want, rel=1e-10), name


def test_gate_probability_is_that_of_draws():
    made, h = posterior("gated"), torch.randn(1, 4).double()
    with torch.no_grad():
        mu, sigma = made._of(made.mean, h), made._sigma(h)
        t = made._threshold(torch.tanh(sigma / mu.abs()))
        q, rest = engine.methods.posterior.opened(mu, sigma, t)
        z = mu + sigma * torch.randn(200_000, 2, 6, generator=torch.Generator().manual_seed(0)).double()
    share = (z.abs() >= t).double().mean(dim=0)
    assert (share - q[0]).abs().max() <= 5 * (0.25 / 200_000) ** 0.5
    assert (q + rest - 1).abs().max() <= 1e-12


def term(made, base, vectors, x, y, which):
    """One of the six, as a function of the posterior's parameters, with the noise held."""
    drawn = made.draw(base(x).detach(), torch.Generator().manual_seed(1))
    if which != "likelihood":
        return drawn.terms[which]
    logits = engine.weights.forward(base, x, vectors, drawn.coefficients)
    return nn.functional.cross_entropy(logits, y)


@pytest.mark.parametrize("which", ["likelihood", "kl_gate", "kl_slab", "boundary", "exploration", "uncertainty"])
def test_gradient_of_every_term_by_finite_differences(setting, which):
    base, tuned, x, y = setting
    vectors = engine.weights.task_vectors(base, *tuned)
    made = posterior("gated")
    value = term(made, base, vectors, x, y, which)
    names = dict(made.named_parameters())
    gradients = torch.autograd.grad(value, list(names.values()), allow_unused=True)
    random, reached = torch.Generator().manual_seed(0), []
    for (name, p), gradient in zip(names.items(), gradients, strict=True):
        gradient = torch.zeros_like(p) if gradient is None else gradient
        if gradient.any():
            reached.append(name)
        flat = p.data.view(-1)
        for at in torch.randperm(p.numel(), generator=random)[:12].tolist():
            was, values = flat[at].item(), []
            for sign in (1, -1):
                flat[at] = was + sign * 1e-6
                with torch.no_grad():
                    values.append(float(term(made, base, vectors, x, y, which)))
            flat[at] = was
            assert abs((values[0] - values[1]) / 2e-6 - float(gradient.view(-1)[at])) <= 1e-6, (name, at)
    networks = [
        f"{part}.{at}.{what}" for part in ("mean", "log_variance") for at in (0, 2) for what in ("weight", "bias")
    ]
    wanted = {"exploration": ["log_psi"]}.get(which, ["log_psi", *networks])
    assert sorted(reached) == sorted(wanted)


def test_no_gradient_is_lost_where_q_is_0_or_1():
    made = posterior("gated")
    with torch.no_grad():
        made.mean[2].bias.copy_(torch.tensor([40.0, -40.0, 0.0] * 4))
        made.log_variance[2].bias.fill_(-30.0)
    drawn = made.draw(torch.randn(3, 4).double(), torch.Generator().manual_seed(0))
    (drawn.coefficients.sum() + sum(drawn.terms.values())).backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())


def loss_of(y):
    return lambda logits, at: nn.functional.cross_entropy(logits, y[at], reduction="none")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_adam_on_one_merged_model_a_sample(setting, kind):
    """Without the engine's forward: each sample's weights are written out and run by themselves."""
    base, tuned, x, y = setting
    vectors = engine.weights.task_vectors(base, *tuned)
    blocks = tuple(vectors.blocks())
    made = engine.vtvc.fit(
        base, vectors, x, loss_of(y), posterior=kind, epochs=1, batch=9, lr=0.01, seed=4, progress=False
    )
    want = Posterior(kind, vectors.names, blocks, 4, Constants(), 4, torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(4 * 1_000_003))
    drawn = want.draw(base(x).detach()[order], torch.Generator().manual_seed(4 * 1_000_003))
    c = drawn.coefficients if drawn.coefficients.ndim == 3 else drawn.coefficients.expand(9, -1, -1)
    losses = []
    for row, at in enumerate(order.tolist()):
        theta = {
            name: p.detach() + sum(c[row, t, i] * (one.get_parameter(name) - p).detach() for t, one in enumerate(tuned))
            for i, (name, p) in enumerate(base.named_parameters())
        }
        losses.append(nn.functional.cross_entropy(functional_call(base, theta, (x[[at]],)), y[[at]]))
    adam = torch.optim.AdamW(want.parameters(), lr=0.01, weight_decay=0.01)
    (torch.stack(losses).mean() + sum(drawn.terms.values())).backward()
    adam.step()
    assert made.metadata["losses"] == [pytest.approx(torch.stack(losses).mean().item(), rel=1e-12)]
    for name, p in want.named_parameters():
        assert (p - dict(made.named_parameters())[name]).abs().max() <= 1e-9, name
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_broken_off_and_gone_on_with_it_is_the_same_to_the_bit(setting, kind, tmp_path):
    base, tuned, x, y = setting
    vectors = engine.weights.task_vectors(base, *tuned)
    options = dict(posterior=kind, epochs=3, batch=4, progress=False)
    whole = engine.vtvc.fit(base, vectors, x, loss_of(y), **options)
    calls = []

    def dies(logits, at):
        calls.append(at)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss_of(y)(logits, at)

    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        engine.vtvc.fit(base, vectors, x, dies, checkpoint=file, checkpoint_every=2, **options)
    again = engine.vtvc.fit(base, vectors, x, loss_of(y), checkpoint=file, checkpoint_every=2, **options)
    assert again.metadata["losses"] == whole.metadata["losses"]
    for name, p in whole.named_parameters():
        assert torch.equal(p, dict(again.named_parameters())[name])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_read(setting, kind, tmp_path):
    base, tuned, x, y = setting
    vectors = engine.weights.task_vectors(base, *tuned)
    made = engine.vtvc.fit(base, vectors, x, loss_of(y), posterior=kind, epochs=1, progress=False)
    made.save(tmp_path / "posterior.safetensors")
    read, h = engine.vtvc.Posterior.load(tmp_path / "posterior.safetensors"), engine.vtvc.features_of(base, x)
    assert torch.equal(read.coefficients(h), made.coefficients(h))
    assert read.metadata["losses"] == made.metadata["losses"]


@pytest.mark.parametrize("seed", [2**50, -(2**50), 2**63 - 1, -(2**63), 1_764_491_081_123_456_789])
def test_any_seed_of_64_bits(setting, seed):
    base, tuned, x, y = setting
    vectors = engine.weights.task_vectors(base, *tuned)
    one, same, other = (
        engine.vtvc.fit(base, vectors, x, loss_of(y), epochs=1, batch=4, seed=s, progress=False)
        for s in (seed, seed, seed ^ 1)
    )
    assert one.metadata["losses"] == same.metadata["losses"] != other.metadata["losses"]


@pytest.mark.parametrize("seed", [0, 7, -7, 9_223_344_366_854, 18_000_000_000_000])
def test_a_seed_that_torch_takes_draws_what_torch_draws(seed):
    want = torch.Generator().manual_seed(seed * 1_000_003 + 5)
    assert torch.equal(engine.vtvc._random(seed, 5).get_state(), want.get_state())


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_are_fitted_on_are_read_again(kind):
    """Other dtypes than the posterior's, and numpy's."""
    torch.manual_seed(0)
    base, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.randint(2, (6,))
    vectors = engine.weights.task_vectors(base, nn.Linear(3, 2))
    h = torch.randn(6, 5).bfloat16().float()
    options = dict(posterior=kind, epochs=2, progress=False)
    want = engine.vtvc.fit(base, vectors, x, loss_of(y), features=h, **options).coefficients(h)
    for other in (h.double(), h.bfloat16(), h.numpy(), h.double().numpy()):
        made = engine.vtvc.fit(base, vectors, x, loss_of(y), features=other, **options)
        assert torch.equal(made.coefficients(other), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_base_is_fitted_by_a_float32_posterior(setting, kind, dtype, tmp_path):
    """To the losses of a float32 base of the same weights, within the base's rounding; kept by a file to the bit."""
    base, tuned, x, y = setting
    made, losses = {}, {}
    for one in (dtype, torch.float32):
        to = lambda thing, one=one: deepcopy(thing).to(dtype).to(one)  # noqa: E731
        vectors = engine.weights.task_vectors(to(base), *map(to, tuned)).to(dtype=one)
        h, options = to(x.float()), dict(posterior=kind, epochs=5, batch=4, progress=False)
        made[one] = engine.vtvc.fit(to(base), vectors, h, loss_of(y), features=h, **options)
        losses[one] = torch.tensor(made[one].metadata["losses"])
    fitted = made[dtype]
    assert {p.dtype for p in fitted.parameters()} == {torch.float32}
    assert (losses[dtype] - losses[torch.float32]).abs().max() <= 20 * torch.finfo(dtype).eps
    c, narrow = fitted.coefficients(h), deepcopy(base).to(dtype)
    assert c.isfinite().all()
    assert c.any()
    vectors = engine.weights.task_vectors(narrow, *(deepcopy(one).to(dtype) for one in tuned))
    composed = engine.weights.forward(narrow, x.to(dtype), vectors, c)
    assert composed.dtype == dtype
    fitted.save(tmp_path / "posterior.safetensors")
    read = engine.vtvc.Posterior.load(tmp_path / "posterior.safetensors")
    for features in (h, h.to(dtype)):
        assert torch.equal(read.coefficients(features), c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_posterior_is_kept_by_a_file(kind, dtype, tmp_path):
    made, h = posterior(kind).to(dtype), torch.randn(20, 4)
    made.save(tmp_path / "posterior.safetensors")
    read = engine.vtvc.Posterior.load(tmp_path / "posterior.safetensors")
    assert {p.dtype for p in read.parameters()} == {dtype}
    assert torch.equal(read.coefficients(h), made.coefficients(h))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off_it_fits_the_same(setting, kind, mode, tmp_path):
    """Also samples and features that were made there, and a checkpoint of outside."""
    base, tuned, x, y = setting
    vectors = engine.weights.task_vectors(base, *tuned)
    options = dict(posterior=kind, batch=4, progress=False)
    want = engine.vtvc.fit(base, vectors, x, loss_of(y), epochs=2, **options)
    engine.vtvc.fit(base, vectors, x, loss_of(y), epochs=2, checkpoint=tmp_path / "outside.safetensors", **options)
    with mode():
        inside, targets = x.clone(), y.clone()
        one = engine.vtvc.fit(base, vectors, inside, loss_of(targets), epochs=2, **options)
        h = engine.vtvc.features_of(base, inside)
        other = engine.vtvc.fit(base, vectors, {"x": inside}, loss_of(targets), features=h, epochs=2, **options)
        again = engine.vtvc.fit(
            base, vectors, inside, loss_of(targets), epochs=2, checkpoint=tmp_path / "outside.safetensors", **options
        )
        c = other.coefficients(h)
    assert not torch.is_inference_mode_enabled()
    for made in (one, other, again):
        assert made.metadata["losses"] == want.metadata["losses"]
        assert not any(p.is_inference() for p in made.parameters())
    assert torch.equal(c, want.coefficients(engine.vtvc.features_of(base, x)))


class Noisy(nn.Module):
    """Dropout, and statistics that a forward in train() changes; one part does not train."""

    def __init__(self):
        super().__init__()
        self.body, self.drop, self.norm = Network(), nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.body.norm.eval()

    def forward(self, x):
        if x.isnan().any():
            raise ArithmeticError("NaN")
        return self.norm(self.drop(self.body(x)))


@pytest.mark.parametrize("kind", ["gated", "shared"])
def test_a_base_that_trains_runs_as_in_eval_and_trains_again(kind, tmp_path):
    torch.manual_seed(0)
    base, x, y = Noisy(), torch.randn(9, 5), torch.randint(4, (9,))
    with torch.no_grad():
        tuned = deepcopy(base)
        for p in tuned.parameters():
            p += 0.3 * torch.randn_like(p)
    vectors = engine.weights.task_vectors(base, tuned)
    modes, state = [part.training for part in base.modules()], deepcopy(base.state_dict())
    quiet = deepcopy(base).eval()
    options = dict(posterior=kind, epochs=3, batch=4, progress=False)
    want = engine.vtvc.fit(quiet, vectors, x, loss_of(y), **options)
    assert torch.equal(engine.vtvc.features_of(base, x), engine.vtvc.features_of(quiet, x))
    calls = []

    def dies(outputs, at):
        calls.append(at)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss_of(y)(outputs, at)

    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        engine.vtvc.fit(base, vectors, x, dies, checkpoint=file, checkpoint_every=2, **options)
    made = engine.vtvc.fit(base, vectors, x, loss_of(y), checkpoint=file, checkpoint_every=2, **options)
    assert made.metadata["losses"] == want.metadata["losses"]
    with pytest.raises(ArithmeticError):
        engine.vtvc.features_of(base, x * torch.nan)
    with pytest.raises(ArithmeticError):
        engine.vtvc.fit(base, vectors, x * torch.nan, loss_of(y), features=x, **options)
    assert [part.training for part in base.modules()] == modes
    assert all(torch.equal(now, state[name]) for name, now in base.state_dict().items())


def test_zeros_are_exact_and_are_those_below_the_threshold():
    made, h = posterior("gated"), torch.randn(50, 4).double()
    c, mu, sigma = made.coefficients(h), made._of(made.mean, h).detach(), made._sigma(h).detach()
    psi1, psi2 = made.log_psi.detach().exp()
    below = mu.abs() < psi1 * (1 + psi2 * torch.tanh(sigma / mu.abs()))
    assert torch.equal(c == 0, below)
    assert 0 < below.double().mean() < 1
    assert torch.equal(c[~below], mu[~below])


def test_each_sample_gets_the_vector_that_it_needs():
    """Two tasks that pull apart, told by one number of the input: no one coefficient does both."""
    torch.manual_seed(0)
    base = nn.Linear(3, 2)
    tuned = [deepcopy(base) for _ in range(2)]
    for one, sign in zip(tuned, (1.0, -1.0), strict=True):
        one.weight.data += torch.tensor([[0.0, sign, 0.0], [0.0, -sign, 0.0]]) * 4
    x = torch.randn(256, 3)
    x[:, 2] = torch.where(torch.arange(256) % 2 == 0, 1.0, -1.0)
    y = ((x[:, 1] * x[:, 2]) < 0).long()
    vectors = engine.weights.task_vectors(base, *tuned)
    right = {}
    for kind in ("gated", "shared"):
        made = engine.vtvc.fit(
            base, vectors, x, loss_of(y), posterior=kind, features=x, epochs=30, batch=64, lr=0.03, progress=False
        )
        logits = engine.weights.forward(base, x, vectors, made.coefficients(x))
        right[kind] = (logits.argmax(dim=1) == y).float().mean().item()
    assert right["gated"] >= 0.95
    assert right["shared"] <= 0.65


def test_inputs_by_name_and_blocks_of_a_layer(setting):
    base, tuned, x, y = setting
    vectors = engine.weights.task_vectors(base, *tuned)
    options = dict(epochs=1, progress=False, blocks="layer")
    one = engine.vtvc.fit(base, vectors, {"x": x}, loss_of(y), **options)
    other = engine.vtvc.fit(base, vectors, x, loss_of(y), **options)
    assert one.blocks == tuple(vectors.blocks("layer"))
    h = engine.vtvc.features_of(base, {"x": x}, batch=2)
    assert (h - base(x)).abs().max() <= 1e-12
    assert torch.equal(one.coefficients(h), other.coefficients(h))
