"""Effects ranked, as data frames and pictures; what is saved comes back bit by bit."""

import sys

import pytest
import torch
from PIL import Image

import engine
from engine import plots
from engine.questions.effects import Effects
from tests.effects import H, L, N, made


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


def test_dollars_in_titles_are_no_mathematics(tmp_path):
    """Nor in the names of tasks beside bars, or of lines in legends."""
    title, path, values = "cost $x_{$ y", tmp_path / "a.png", torch.tensor([[0.5, 1.0]])
    effects = Effects(torch.tensor([[[0.5, 1.0]]]), torch.zeros(1))
    for draw in (
        lambda: effects.heatmap(path, 1, title=title),
        lambda: plots.heatmap(path, values, title=title),
        lambda: plots.learning_curve(path, [1.0, 0.5], title),
        lambda: plots.by_layer(path, {title: [0.5, 1.0]}, {title: 0.1}, title),
        lambda: plots.scores(path, {title: {"MTV": [0.5]}, "b": {"MTV": [0.5]}}, "accuracy", title),
        lambda: plots.faithfulness(path, [0.1, 1.0], values[0], title=title),
        lambda: plots.scaling(path, {title: {1: [0.5], 2: [0.5]}}, title),
    ):
        draw()
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()
