"""Statistics against scipy's, or their definition written out; what is saved comes back bit by bit."""

import itertools
import sys

import pytest
import torch
from PIL import Image
from scipy import stats

import engine
from engine import plots
from engine.questions import statistics
from engine.questions.effects import Effects

N, P, L, H = 7, 2, 3, 4


def made(n=N, dtype=torch.float32, seed=0, **fields):
    random = torch.Generator().manual_seed(seed)
    patched = torch.randn(n, L, H, generator=random, dtype=dtype)
    return Effects(patched, torch.randn(n, generator=random, dtype=dtype), **fields)


@pytest.fixture
def effects():
    return made(reference=torch.linspace(3, 4, N), metric="logit_difference")


@pytest.fixture
def at_positions(random):
    patched = torch.randn(N, P, L, H, generator=random)
    return Effects(patched, torch.rand(N, generator=random), positions=(-2, -1), metadata={"model": "é", "seed": 3})


@pytest.fixture
def of_groups(random):
    masks = torch.rand(2, L, H, generator=random) < 0.5
    groups = {"late": masks[0], "early": masks[1]}
    return Effects(torch.randn(N, 2, generator=random), torch.rand(N), torch.rand(N) + 2, groups, metric="kl")


KINDS = ("effects", "at_positions", "of_groups")


@pytest.fixture(params=KINDS)
def any_kind(request):
    return request.getfixturevalue(request.param)


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


def with_means(means, **fields):
    means = torch.as_tensor(means, dtype=torch.float64)
    return Effects(torch.stack([means - 1, means + 1]), torch.zeros(2, dtype=torch.float64), **fields)


def test_top():
    e = with_means([[0.0, -5.0, 2.0], [2.0, 1.0, -2.0]])
    assert e.top(4) == [(0, 1), (0, 2), (1, 0), (1, 2)]  # of equal ones the first
    assert e.top(3, "positive") == [(0, 2), (1, 0), (1, 1)]
    assert e.top(2, by="negative") == [(0, 1), (1, 2)]
    assert sorted(e.top(6)) == [(layer, head) for layer in range(2) for head in range(3)]


def test_top_of_very_many_that_are_equal():
    means = torch.zeros(40, 50)
    means[30, 2] = 1
    assert with_means(means).top(4) == [(30, 2), (0, 0), (0, 1), (0, 2)]


def test_top_of_groups_and_positions():
    mask = torch.zeros(L, H, dtype=torch.bool)
    assert with_means([1.0, 3.0], groups={"a": mask, "b": mask}).top(2) == ["b", "a"]
    assert with_means([[[1.0, 2.0]], [[0.0, -4.0]]], positions=[5, -1]).top(2) == [(-1, 0, 1), (5, 0, 1)]
    both = with_means([[1.0, 3.0], [5.0, 0.0]], groups={"a": mask, "b": mask}, positions=[5, -1])
    assert both.top(2) == [(-1, "a"), (5, "b")]


def test_top_heads_can_be_patched(model):
    e = Effects(torch.rand(2, 3, 6), torch.zeros(2))
    logits = engine.patch(model, "abc", heads=e.top(4), values=torch.zeros(3, 6, 8))
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask.view(-1)[e.mean.flatten().topk(4).indices] = True
    assert torch.equal(logits, engine.patch(model, "abc", heads=mask, values=torch.zeros(3, 6, 8)))


def test_rank_correlation(effects):
    other = made(seed=8)
    want = stats.spearmanr(effects.mean.flatten(), other.mean.flatten()).statistic
    assert effects.rank_correlation(other) == pytest.approx(want)
    assert abs(want) < 0.9
    assert effects.rank_correlation(other.mean.float()) == pytest.approx(want)
    assert effects.rank_correlation(effects.mean**3) == pytest.approx(1)
    assert effects.rank_correlation(-effects.mean) == pytest.approx(-1)


def test_dataframe(effects):
    frame = effects.to_dataframe()
    assert list(frame.columns) == [
        "prompt", "layer", "head", "patched", "clean", "effect", "reference", "normalised",
    ]  # fmt: skip
    assert len(frame) == N * L * H
    assert not frame.duplicated(["prompt", "layer", "head"]).any()
    for row in frame.itertuples():
        at = (row.prompt, row.layer, row.head)
        assert row.patched == effects.patched[at].item()
        assert row.clean == effects.clean[row.prompt].item()
        assert row.effect == effects.effect[at].item()
        assert row.reference == effects.reference[row.prompt].item()
        assert row.normalised == effects.normalised[at].item()


def test_dataframe_of_positions_and_groups(at_positions, of_groups):
    frame = at_positions.to_dataframe()
    assert list(frame.columns) == ["prompt", "position", "layer", "head", "patched", "clean", "effect"]
    for row in frame.itertuples():
        place = at_positions.positions.index(row.position)
        assert row.effect == at_positions.effect[row.prompt, place, row.layer, row.head].item()
    frame = of_groups.to_dataframe()
    for row in frame.itertuples():
        assert row.patched == of_groups.patched[row.prompt, list(of_groups.groups).index(row.group)].item()


def test_summary(any_kind):
    e = any_kind
    frame = e.summary(level=0.8, correction="holm", resamples=150, seed=4)
    numbers = ["mean", "standard_error", "low", "high", "p"]
    named = [c for c in frame.columns if c not in numbers]
    assert list(frame.columns) == named + numbers
    assert list(frame[named].itertuples(index=False, name=None)) == [
        u if isinstance(u, tuple) else (u,) for u in e._units
    ]
    low, high = e.interval(0.8, 150, 4)
    for name, want in zip(numbers, [e.mean, e.standard_error, low, high, e.p_values("holm", 150, 4)], strict=True):
        assert frame[name].tolist() == want.flatten().tolist()


def test_round_trip(any_kind, tmp_path):
    """Bit by bit, twice over; also -0.0 and the smallest numbers."""
    e = any_kind
    e.patched.view(-1)[:3] = torch.tensor([-0.0, 1e-45, 3.4e38])
    path = tmp_path / "folder" / "effects.safetensors"
    e.save(path)
    loaded = Effects.load(path)
    for name in ("patched", "clean", "reference"):
        one, other = getattr(e, name), getattr(loaded, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one.view(torch.int32), other.view(torch.int32))
    assert loaded.groups is None or list(loaded.groups) == list(e.groups)
    assert loaded.groups is None or all(torch.equal(loaded.groups[name], e.groups[name]) for name in e.groups)
    assert loaded.metric == e.metric
    assert loaded.metadata == e.metadata
    assert loaded._units == e._units
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_float64_stays(tmp_path):
    made(dtype=torch.float64).save(tmp_path / "e")
    assert torch.equal(Effects.load(tmp_path / "e").patched, made(dtype=torch.float64).patched)


def test_repr(effects, at_positions, of_groups):
    """One line, not three tensors."""
    assert "logit_difference: 7 prompts x 3 layers x 4 heads" in repr(effects)
    assert "7 prompts x 2 positions x 3 layers x 4 heads" in repr(at_positions)
    assert "7 prompts x 2 groups" in repr(of_groups)
    assert all("\n" not in repr(e) for e in (effects, at_positions, of_groups))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def maps_of(figure):
    return [axes for axes in figure.axes if axes.images]


def test_heatmap(effects, tmp_path, drawn):
    effects.heatmap(tmp_path / "map.png", top=3, by="negative", title="Antonyms")
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG"
    (axes,) = maps_of(drawn[0])
    shown = axes.images[0]
    assert torch.equal(torch.tensor(shown.get_array().filled()), effects.mean.T)
    low, high = shown.get_clim()
    assert low == -high == -effects.mean.abs().max()  # zero is in the middle
    dots = [tuple(int(i) for i in xy) for xy in axes.collections[0].get_offsets()]
    assert sorted(dots) == sorted(effects.top(3, "negative"))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "head")
    texts = [t.get_text() for t in drawn[0].findobj(lambda a: hasattr(a, "get_text"))]
    for text in ("Antonyms", "top 3", "mean effect on logit difference"):
        assert text in texts


def test_heatmap_of_positions(at_positions, tmp_path, drawn):
    """One map a position, on one scale, the top heads of them all together."""
    at_positions.heatmap(tmp_path / "map.png", top=5)
    first, second = maps_of(drawn[0])
    assert (first.get_title(), second.get_title()) == ("position -2", "position -1")
    assert first.images[0].get_clim() == second.images[0].get_clim()
    dots = [
        (position, *(int(i) for i in xy))
        for position, axes in zip((-2, -1), (first, second), strict=True)
        for xy in axes.collections[0].get_offsets()
    ]
    assert sorted(dots) == sorted(at_positions.top(5))


def test_heatmap_of_nothing(tmp_path, drawn):
    Effects(torch.zeros(2, L, H), torch.zeros(2)).heatmap(tmp_path / "map.png", top=0)
    (axes,) = maps_of(drawn[0])
    assert axes.images[0].get_clim() == (-1, 1)
    assert axes.get_legend() is None


def texts_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


TOKENS = [" Paris", "\n", "$\\frac$", "\u6771\u200b", "\ud800"]  # some that matplotlib would stumble over
SEEN = ["·Paris", "↵", "$\\frac$", r"\u6771\u200b", r"\ud800"]


def test_heatmap_of_layers_at_tokens(tmp_path, drawn):
    """One map: tokens down, layers across; their spaces are seen, and what fonts lack or take for formulas is drawn."""
    means = torch.arange(15.0).reshape(5, 3)
    e = with_means(means, positions=[0, 1, 2, 3, 4], tokens=TOKENS, site="resid_post")
    e.heatmap(tmp_path / "map.png", top=2, title="\u6771")
    (axes,) = maps_of(drawn[0])
    assert torch.equal(torch.tensor(axes.images[0].get_array().filled()), means.double())
    assert texts_of(axes.yaxis) == SEEN
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "token")
    assert sorted((int(y), int(x)) for x, y in axes.collections[0].get_offsets()) == sorted(e.top(2))


def test_heatmap_of_layers_at_names(tmp_path, drawn):
    """Names of positions in place of tokens; without positions, one row."""
    with_means([[1.0, 2.0]] * 2, positions=["subject", "a" * 99], site="scores").heatmap(tmp_path / "map.png", top=1)
    with_means([1.0, 2.0], site="mlp_out").heatmap(tmp_path / "map.png", top=1)
    with_means([[1.0, 2.0]] * 3, positions=[7, -2, -1], site="mlp_out").heatmap(tmp_path / "map.png", top=1)
    named, row, numbered = (maps_of(figure)[0] for figure in drawn)
    assert texts_of(named.yaxis) == ["subject", "a" * 23 + "…"]
    assert named.get_ylabel() == numbered.get_ylabel() == "position"
    assert row.images[0].get_array().shape == (1, 2)
    assert (row.get_ylabel(), texts_of(row.yaxis)) == ("", [])
    assert texts_of(numbered.yaxis) == ["7", "-2", "-1"]


def test_heatmap_of_groups_at_positions(tmp_path, drawn):
    means = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 1.0]])
    e = with_means(means, groups=["layers 0 to 1", "$late$", "m"], positions=[5, -1], tokens=["a", "b"])
    e.heatmap(tmp_path / "map.png", top=1)
    (axes,) = maps_of(drawn[0])
    assert torch.equal(torch.tensor(axes.images[0].get_array().filled()), means.double())
    assert (texts_of(axes.yaxis), texts_of(axes.xaxis)) == (["a", "b"], ["layers 0 to 1", "$late$", "m"])


def test_heatmap_of_neurons(tmp_path, drawn):
    """Layers down, as there are many neurons; at each position, which its title names."""
    means = torch.randn(2, 3, 1536)
    e = with_means(means, site="mlp_act", positions=[0, 4], tokens=[" a", "$x$"])
    e.heatmap(tmp_path / "map.png")
    first, second = maps_of(drawn[0])
    assert torch.equal(torch.tensor(second.images[0].get_array().filled()), means[1].double())
    assert (first.get_title(), second.get_title()) == ("position 0: ·a", "position 4: $x$")
    assert (first.get_xlabel(), second.get_xlabel(), second.get_ylabel()) == ("", "neuron", "layer")
    with Image.open(tmp_path / "map.png") as image:
        assert image.width > 1536


@pytest.mark.parametrize(
    ("module", "call", "said"),
    [
        ("pandas", lambda e, path: e.to_dataframe(), r"pandas: pip install 'headpatch\[stats\]'"),
        ("scipy.stats", lambda e, path: e.interval(), r"scipy: pip install 'headpatch\[stats\]'"),
        ("scipy.stats", lambda e, path: e.p_values("fdr"), r"scipy: pip install 'headpatch\[stats\]'"),
        ("scipy.stats", lambda e, path: e.rank_correlation(e), r"scipy: pip install 'headpatch\[stats\]'"),
        ("scipy.stats", lambda e, path: e.show(path), r"scipy: pip install 'headpatch\[stats\]'"),
        ("matplotlib", lambda e, path: e.heatmap(path), r"matplotlib: pip install 'headpatch\[plots\]'"),
    ],
)
def test_packages_that_are_missing(effects, tmp_path, monkeypatch, module, call, said):
    """What needs them says so; the rest works."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=said):
        call(effects, tmp_path / "map.png")
    assert effects.p_values("holm").shape == (L, H)
