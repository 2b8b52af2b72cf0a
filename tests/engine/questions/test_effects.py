"""Statistics against scipy's, or their definition written out; what is saved comes back bit by bit."""

import itertools

import pytest
import torch
from scipy import stats

from engine.questions import statistics
from engine.questions.effects import Effects
from tests.effects import H, L, N, made


def test_effect_and_mean(any_kind):
    e = any_kind
    for prompt in range(N):
        assert torch.equal(e.effect[prompt], e.patched[prompt] - e.clean[prompt])
    assert e.mean.dtype == torch.float64
    want = torch.stack([e.patched[i].double() - e.clean[i].double() for i in range(N)]).mean(dim=0)
    assert torch.allclose(e.mean, want, rtol=1e-14, atol=1e-15)


def test_normalised(effects):
    for i in range(N):
        want = (effects.patched[i] - effects.clean[i]) / (effects.reference[i] - effects.clean[i])
        assert torch.equal(effects.normalised[i], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_where_the_reference_is_the_clean_run(dtype):
    """0/0, and what rounding makes of it, is NaN and said; a small but real difference is not."""
    clean = torch.tensor([0.3, 0.3, 0.3, 0.0])
    reference = torch.tensor([0.3, 0.3 + 3e-8, 0.3001, 0.0])
    e = Effects(torch.rand(4, L, H, dtype=dtype), clean.to(dtype), reference.to(dtype))
    with pytest.warns(UserWarning, match=r"prompts \[0, 1, 3\] are NaN: reference and clean"):
        normalised = e.normalised
    assert normalised.isnan().flatten(1).all(dim=1).tolist() == [True, True, False, True]
    assert normalised[2].isfinite().all()


def test_standard_error(any_kind):
    want = stats.sem(any_kind._over_prompts.numpy(), axis=0)
    assert any_kind.standard_error.flatten().tolist() == pytest.approx(want.tolist(), rel=1e-12)


def test_interval_is_scipys(any_kind):
    """Unit by unit, by its plain call."""
    low, high = any_kind.interval(0.9, resamples=300, seed=5)
    assert low.shape == high.shape == any_kind.patched.shape[1:]
    for unit, column in enumerate(any_kind._over_prompts.T):
        want = stats.bootstrap((column.numpy(),), lambda x, axis: x.mean(axis=axis),
                               confidence_level=0.9, n_resamples=300, rng=5).confidence_interval  # fmt: skip
        assert (low.flatten()[unit], high.flatten()[unit]) == pytest.approx((want.low, want.high), rel=1e-9)


def test_interval_of_units_that_do_not_vary():
    """No effect at all, or the same on every prompt: a point, without scipy's warning and NaN."""
    patched = torch.rand(N, L, H, dtype=torch.float64)
    patched[:, 0, 0], patched[:, 2, 1] = 0.0, 0.25
    low, high = Effects(patched, torch.zeros(N, dtype=torch.float64)).interval(resamples=99)
    assert low[0, 0] == high[0, 0] == 0
    assert low[2, 1] == high[2, 1] == 0.25
    assert (low < high).sum() == L * H - 2


@pytest.mark.parametrize("n", [2, 3])
def test_interval_of_few_prompts_is_finite(n):
    low, high = made(n).interval(resamples=200)
    assert low.isfinite().all()
    assert (low <= high).all()


def test_interval_covers(random):
    """A 90% interval of 40 prompts holds the true mean of nine units in ten."""
    x = torch.randn(40, 20, 25, generator=random)
    low, high = Effects(x + 0.5, torch.zeros(40)).interval(0.9, resamples=999)
    covered = ((low <= 0.5) & (high >= 0.5)).double().mean()
    assert 0.84 < covered < 0.94  # 500 units: a standard deviation is 0.013; the bootstrap is a little narrow


def test_seeds(effects):
    many = made(n=20)
    for statistic in (many.interval, lambda **o: (many.p_values(None, **o),)):
        first = statistic(resamples=200, seed=1)
        torch.manual_seed(99)  # the caller's random numbers play no part
        assert all(torch.equal(a, b) for a, b in zip(first, statistic(resamples=200, seed=1), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, statistic(resamples=200, seed=2), strict=True))


def brute(columns):
    """The p of each column, and p by the largest |t|, over all flips of all signs, by t-tests."""
    flips = [torch.tensor(signs, dtype=torch.float64) for signs in itertools.product((1.0, -1.0), repeat=len(columns))]
    t = torch.stack([torch.from_numpy(stats.ttest_1samp(f[:, None] * columns, 0).statistic) for f in flips]).abs()
    seen = torch.from_numpy(stats.ttest_1samp(columns, 0).statistic).abs() * (1 - 1e-9)
    return (t >= seen).double().mean(dim=0), (t.amax(dim=1)[:, None] >= seen).double().mean(dim=0)


def test_exact_p_values(any_kind):
    """For few prompts: every flip is counted, and the ones of all signs are among them."""
    single, largest = brute(any_kind._over_prompts)
    assert torch.allclose(any_kind.p_values(None).flatten(), single)
    assert torch.allclose(any_kind.p_values("max").flatten(), largest)
    assert (any_kind.p_values(None) * 2 ** (N - 1) % 1 == 0).all()


def test_exact_p_value_is_scipys():
    x = made(n=9, dtype=torch.float64)._over_prompts
    want = stats.permutation_test(
        (x.numpy(),), lambda x, axis: abs(x.mean(axis=axis)), permutation_type="samples", alternative="greater",
        vectorized=True, n_resamples=10_000,
    ).pvalue  # fmt: skip
    assert made(n=9, dtype=torch.float64).p_values(None).flatten().tolist() == pytest.approx(want.tolist())


def test_drawn_p_values_come_close_to_exact_ones():
    e = made(n=12)
    for correction in (None, "max"):
        exact, drawn = (e.p_values(correction, resamples=r) for r in (2048, 2047))
        assert (exact * 2048 % 1 == 0).all()
        assert (drawn * 2048 % 1 == 0).all()  # hits + 1 of resamples + 1
        assert not torch.equal(exact, drawn)
        assert (exact - drawn).abs().max() < 5 * (0.25 / 2047) ** 0.5


def test_smallest_p():
    """2^-(N-1) for effects all of one sign, or one of the drawn flips and one; 1 where there is no effect."""
    patched = torch.rand(6, L, H) + 0.5
    patched[:, 1, 1] = 0
    p = Effects(patched, torch.zeros(6)).p_values(None)
    assert p[1, 1] == 1
    assert p.flatten().sort().values[:-1].tolist() == [2**-5] * (L * H - 1)
    many = Effects(torch.rand(40, L, H) + 0.5, torch.zeros(40))
    assert many.p_values("max", resamples=500).unique().tolist() == [1 / 501]


@pytest.mark.parametrize("scale", [1e-30, 1e-200, 1e200])
def test_p_values_do_not_depend_on_units_of_measure(scale):
    one = made(dtype=torch.float64)
    other = Effects(one.patched * scale, one.clean * scale)
    for correction in (None, "max"):
        assert torch.equal(one.p_values(correction), other.p_values(correction))


def test_flips_that_tie_count():
    """0.1 + 0.2 - 0.3 is not 0 in floating point, but ties with 0.3 - 0.1 - 0.2."""
    x = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)[:, None, None]
    assert Effects(x, torch.zeros(3, dtype=torch.float64)).p_values(None).item() == 1


def test_holm_and_fdr():
    """By their definitions, over the units; some are significant, most are not."""
    e = made(n=9)
    e.patched[:, :2] += torch.linspace(0, 2, 2 * H).view(2, H)
    p = e.p_values(None).flatten().tolist()
    m, ordered = len(p), sorted(p)
    for got, own in zip(e.p_values("holm").flatten().tolist(), p, strict=True):
        last = max(i for i in range(m) if ordered[i] == own)
        assert got == pytest.approx(min(1, max((m - j) * ordered[j] for j in range(last + 1))))
    for got, own in zip(e.p_values("fdr").flatten().tolist(), p, strict=True):
        first = ordered.index(own)
        assert got == pytest.approx(min(1, *(m * ordered[j] / (j + 1) for j in range(first, m))))


def test_holm_of_few():
    """Multiplied by how many are left: 3, 2, 1; never less than that of a smaller p."""
    p = torch.tensor([0.04, 0.01, 0.03], dtype=torch.float64)
    assert statistics.holm(p).tolist() == pytest.approx([0.06, 0.03, 0.06])
    p = torch.tensor([0.9, 0.01, 0.02], dtype=torch.float64)
    assert statistics.holm(p).tolist() == pytest.approx([0.9, 0.03, 0.04])


def test_false_positives(random):
    """Without any true effect: one p in twenty lies under 0.05; corrected, one sweep in twenty has any."""
    single, any_of_them = [], {"max": [], "holm": []}
    for _ in range(150):
        shared = torch.randn(9, 1, 1, generator=random)  # units go together, as heads do
        noise = Effects(shared + torch.randn(9, L, H, generator=random), torch.zeros(9))
        single.append((noise.p_values(None) <= 0.05).double().mean())
        for correction, found in any_of_them.items():
            found.append(bool((noise.p_values(correction) <= 0.05).any()))
    assert 0.02 < sum(single) / 150 < 0.09
    for found in any_of_them.values():
        assert sum(found) / 150 < 0.05 + 3 * (0.05 * 0.95 / 150) ** 0.5


def test_max_finds_what_holm_cannot(random):
    """Ten prompts and 100 units: Holm's smallest p is 100/512."""
    patched = 0.1 * torch.randn(10, 10, 10, generator=random)
    patched[:, 4, 7] += 2
    e = Effects(patched, torch.zeros(10))
    assert e.p_values("holm").min() == pytest.approx(100 / 512)
    significant = (e.p_values("max") <= 0.05).nonzero().tolist()
    assert significant == [[4, 7]]


def test_units_are_held_a_few_at_a_time(monkeypatch, at_positions):
    whole = [*at_positions.interval(resamples=99), *(at_positions.p_values(c) for c in ("max", "holm", "fdr", None))]
    monkeypatch.setattr(statistics, "AT_ONCE", 5)
    again = [*at_positions.interval(resamples=99), *(at_positions.p_values(c) for c in ("max", "holm", "fdr", None))]
    for one, other in zip(whole, again, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


def test_rank_correlation(effects):
    other = made(seed=8)
    want = stats.spearmanr(effects.mean.flatten(), other.mean.flatten()).statistic
    assert effects.rank_correlation(other) == pytest.approx(want)
    assert abs(want) < 0.9
    assert effects.rank_correlation(other.mean.float()) == pytest.approx(want)
    assert effects.rank_correlation(other.mean.numpy()) == pytest.approx(want)
    assert effects.rank_correlation(effects.mean**3) == pytest.approx(1)
    assert effects.rank_correlation(-effects.mean) == pytest.approx(-1)
