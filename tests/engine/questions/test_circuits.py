"""Circuits: everything but the first items ablated, by plain hooks; the areas by hand."""

import math

import pytest
import torch

import engine
from engine import circuits
from engine.questions.items import Items
from tests import plain
from tests.sites import LIMIT, Family

IDS = [[5, 17, 33, 2, 71, 8, 90], [6, 17, 33, 4, 71, 80, 9]]
SOURCES = [[5, 18, 33, 3, 70, 8, 90], [6, 11, 30, 4, 7, 8, 9]]
TARGETS, OTHERS = [13, 44], [50, 7]
ALL = range(7)


@pytest.fixture(scope="module")
def family():
    return Family("llama")


def options(**more):
    return dict(source=SOURCES, targets=TARGETS, others=OTHERS, metric="logit_difference", progress=False) | more


@torch.no_grad()
def plainly(family, n, ablated, spot=ALL, new=None):
    """Logit difference with units ablated. ablated: (layer, unit) pairs by site. new: by site; default the source's."""
    new = new or plain.activations(family.same, "llama", SOURCES[n], list(ablated))
    changes = []
    for site, units in ablated.items():
        theirs = new[site]  # [L, T, U, W]
        mask = torch.zeros(theirs.shape[0], theirs.shape[2], dtype=torch.bool)
        for layer, unit in units:
            mask[layer, unit] = True
        changes += plain.patched(site, mask, torch.stack([theirs[:, p] for p in spot]), spot)
    logits = plain.logits(family.same, "llama", IDS[n], changes)
    return (logits[TARGETS[n]] - logits[OTHERS[n]]).item()


HEADS = [(layer, head) for layer in range(3) for head in range(6)]


@pytest.mark.parametrize("memory", [None, 1])
def test_faithfulness_of_heads(family, memory):
    ranking = engine.sweep(family.model, IDS, **options(positions="together"))
    sizes = (0.0, 0.1, 0.35, 0.5, 1.0)
    found = circuits.faithfulness(family.model, IDS, ranking, sizes=sizes, memory=memory, **options())
    assert found.counts == [0, 1, 6, 9, 18]
    assert found.items[:4] == [f"a{layer}.h{head}" for layer, head in ranking.top(4)]
    for n in range(2):
        for s, count in enumerate(found.counts):
            out = [head for head in HEADS if head not in (ranking.top(count) if count else [])]
            assert abs(found.metric[n, s].item() - plainly(family, n, {"z": out})) <= LIMIT
        assert abs(found.full[n].item() - plainly(family, n, {})) <= LIMIT
        assert abs(found.empty[n].item() - plainly(family, n, {"z": HEADS})) <= LIMIT
    f = found.faithfulness
    assert (f[0], f[-1]) == (0, 1)
    mean = found.metric.mean(dim=0)
    by_hand = (mean - found.empty.mean()) / (found.full.mean() - found.empty.mean())
    torch.testing.assert_close(f, by_hand)
    widths = [0.1, 0.25, 0.15, 0.5]
    area = sum(w * (f[i] + f[i + 1]).item() / 2 for i, w in enumerate(widths))
    apart = sum(w * ((1 - f[i]).abs() + (1 - f[i + 1]).abs()).item() / 2 for i, w in enumerate(widths))
    assert (abs(found.cpr - area) < 1e-9, abs(found.cmd - apart) < 1e-9) == (True, True)


def test_heads_and_mlps_are_ranked_as_one(family):
    heads = engine.sweep(family.model, IDS, **options(positions="together"))
    mlps = engine.sweep(family.model, IDS, **options(positions="together", site="mlp_out"))
    found = circuits.faithfulness(family.model, IDS, [heads, mlps], sizes=(0.2, 0.5), **options())
    assert found.counts == [4, 10]
    assert set(found.items) == {f"a{la}.h{h}" for la, h in HEADS} | {"m0", "m1", "m2"}
    means = dict(zip([f"a{la}.h{h}" for la, h in HEADS], heads.mean.flatten().tolist(), strict=True))
    means |= {f"m{layer}": x for layer, x in enumerate(mlps.mean.tolist())}
    assert found.items == sorted(means, key=lambda name: -abs(means[name]))
    for n in range(2):
        for s, count in enumerate(found.counts):
            kept = found.items[:count]
            out = {"z": [u for u in HEADS if f"a{u[0]}.h{u[1]}" not in kept]}
            out["mlp_out"] = [(layer, 0) for layer in range(3) if f"m{layer}" not in kept]
            assert abs(found.metric[n, s].item() - plainly(family, n, out)) <= LIMIT


@pytest.mark.parametrize("by", ["positive", "negative"])
def test_by_sign(family, by):
    ranking = engine.attribute(family.model, IDS, **options(positions="together"))
    found = circuits.faithfulness(family.model, IDS, ranking, by=by, sizes=(0.3,), **options())
    assert found.items[:5] == [f"a{layer}.h{head}" for layer, head in ranking.top(5, by)]


@pytest.mark.parametrize("values", ["zero", "mean"])
def test_other_ablations(family, values):
    ranking = engine.sweep(family.model, IDS, **options(positions="together"))
    given = options(source=None)
    found = circuits.faithfulness(family.model, IDS, ranking, values, sizes=(0.5,), **given)
    ours = [plain.activations(family.same, "llama", ids, ["z"])["z"] for ids in IDS]
    new = {"z": ours[0] * 0 if values == "zero" else (ours[0] + ours[1]) / 2}
    out = [head for head in HEADS if head not in ranking.top(9)]
    for n in range(2):
        assert abs(found.metric[n, 0].item() - plainly(family, n, {"z": out}, new=new)) <= LIMIT


def test_at_the_last_token(family):
    ranking = engine.sweep(family.model, IDS, **options())
    found = circuits.faithfulness(family.model, IDS, ranking, sizes=(0.5,), positions=-1, **options())
    out = [head for head in HEADS if head not in ranking.top(9)]
    assert abs(found.metric[1, 0].item() - plainly(family, 1, {"z": out}, [6])) <= LIMIT


def test_groups(family):
    """Layers: what is kept is whole layers."""
    ranking = engine.sweep(family.model, IDS, **options(groups="layers", positions="together"))
    found = circuits.faithfulness(family.model, IDS, ranking, sizes=(0.34,), **options())
    layer = int(found.items[0].removeprefix("layer "))
    out = [head for head in HEADS if head[0] != layer]
    assert abs(found.metric[0, 0].item() - plainly(family, 0, {"z": out})) <= LIMIT


def test_completeness(family):
    ranking = engine.sweep(family.model, IDS, **options(positions="together"))
    found = circuits.completeness(family.model, IDS, ranking, 5, subsets=4, seed=3, **options())
    circuit = ranking.top(5)
    assert found.items == [f"a{layer}.h{head}" for layer, head in circuit]
    assert found.subsets.shape == (4, 5)
    assert not found.subsets[0].any()
    assert found.subsets.any()
    for s in range(4):
        gone = [head for head, out in zip(circuit, found.subsets[s].tolist(), strict=True) if out]
        within = [head for head in HEADS if head not in circuit or head in gone]
        for n in range(2):
            assert abs(found.circuit[n, s].item() - plainly(family, n, {"z": within})) <= LIMIT
            assert abs(found.full[n, s].item() - plainly(family, n, {"z": gone})) <= LIMIT
    assert found.incompleteness.shape == (4,)


def test_minimality(family):
    ranking = engine.sweep(family.model, IDS, **options(positions="together"))
    found = circuits.minimality(family.model, IDS, ranking, 3, **options())
    circuit = ranking.top(3)
    assert list(found.groups) == [f"a{layer}.h{head}" for layer, head in circuit]
    for n in range(2):
        whole = [head for head in HEADS if head not in circuit]
        assert abs(found.clean[n].item() - plainly(family, n, {"z": whole})) <= LIMIT
        for i, head in enumerate(circuit):
            assert abs(found.patched[n, i].item() - plainly(family, n, {"z": [*whole, head]})) <= LIMIT


def test_a_file_and_a_picture(family, tmp_path):
    ranking = engine.sweep(family.model, IDS, **options())
    found = circuits.faithfulness(family.model, IDS, ranking, sizes=(0.1, 1.0), **options())
    found.save(tmp_path / "curve.safetensors")
    loaded = circuits.Faithfulness.load(tmp_path / "curve.safetensors")
    assert torch.equal(loaded.metric, found.metric)
    assert (loaded.cpr, loaded.sizes, loaded.items) == (found.cpr, found.sizes, found.items)
    assert loaded.metadata == found.metadata
    found.plot(tmp_path / "curve.png", "heads")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    low, high = found.interval(resamples=200)
    assert (low <= found.faithfulness + 1e-9).all()
    assert (found.faithfulness <= high + 1e-9).all()
    frame = found.to_dataframe()
    assert list(frame["items"]) == found.counts
    assert repr(found).startswith("Faithfulness of 2 prompts, 2 sizes of 18 items: CPR ")


def test_what_is_ablated(family):
    """Each item by itself, of several rankings."""
    heads = engine.Effects(torch.rand(1, 3, 6), torch.zeros(1))
    mlps = engine.Effects(torch.rand(1, 3), torch.zeros(1), site="mlp_out")
    items = Items.of(family.model, [heads, mlps], "absolute")
    kept = torch.ones(21, 21, dtype=torch.bool).fill_diagonal_(False)
    of_heads, of_mlps = items.ablated(kept)
    assert of_heads.flatten(1).float().argmax(dim=1)[:18].tolist() == list(range(18))
    assert of_heads.sum() == 18
    assert of_mlps[18:, :, 0].tolist() == torch.eye(3).bool().tolist()


def test_circuits_of_edges(family):
    """The first edges of EAP's ranking are the run's own, the others the source's; 0 and all are these runs."""
    ranking = engine.attribute(family.model, IDS, edges=True, **options())
    sizes = (0.0, 0.05, 0.3, 1.0)
    found = circuits.faithfulness(family.model, IDS, ranking, sizes=sizes, **options())
    graph = engine.Graph.of(family.model)
    for n in range(2):
        assert abs(found.full[n].item() - plainly(family, n, {})) <= LIMIT
        logits = plain.logits(family.same, "llama", SOURCES[n])
        assert abs(found.empty[n].item() - (logits[TARGETS[n]] - logits[OTHERS[n]]).item()) <= LIMIT
        for s in (1, 2):
            keep = torch.zeros_like(graph.exists)
            for name in ranking.top(found.counts[s]):
                keep[graph.edge(name)] = True
            logits = engine.edge_runs(family.model, IDS[n], SOURCES[n], keep)
            assert abs(found.metric[n, s].item() - (logits[TARGETS[n]] - logits[OTHERS[n]]).item()) <= LIMIT
    assert (found.faithfulness[0], found.faithfulness[-1]) == (0, 1)
    one = circuits.minimality(family.model, IDS, ranking, 2, **options())
    assert list(one.groups) == ranking.top(2)


def test_an_edge_is_a_path(family):
    """Patching one edge is path patching with heads and MLPs held, at all tokens."""
    names = ["a0.h2->a1.h3<q>", "a1.h0->a2.h1<k>", "m0->m2", "a1.h4->logits"]
    exact = engine.exact_edges(family.model, IDS, edges=names, **options())
    for i, name in enumerate(names):
        sender, receiver = name.split("->")
        given = options(senders=[sender], receivers=receiver, freeze="heads and MLPs", positions="together")
        path = engine.paths(family.model, IDS, **given)
        torch.testing.assert_close(exact.patched[:, i], path.patched[:, 0], atol=LIMIT, rtol=0)


@pytest.mark.parametrize("sizes", [[0.0], [0.5]])
def test_one_size_encloses_no_area(family, sizes):
    ranked = engine.sweep(family.model, IDS, positions="together", **options())
    found = circuits.faithfulness(family.model, IDS, ranked, sizes=sizes, **options())
    assert found.faithfulness.isfinite().all()
    assert math.isnan(found.cpr)
    assert math.isnan(found.cmd)


def test_nothing_to_be_faithful_to():
    """Everything kept and nothing kept score the same."""
    one = circuits.Faithfulness([0.0, 1.0], [0, 18], torch.ones(2, 2), torch.ones(2), torch.ones(2) + 1e-8)
    with pytest.warns(UserWarning, match="the metric is the same with everything kept and nothing"):
        assert one.faithfulness.isnan().all()


def test_groups_with_arrows_in_their_names(family):
    masks = torch.eye(18, dtype=torch.bool).unflatten(1, (3, 6))
    groups = {"x->y": masks[3], "y->x": masks[7]}
    ranked = engine.sweep(family.model, IDS, groups=groups, positions="together", **options())
    found = circuits.faithfulness(family.model, IDS, ranked, sizes=[0.0, 1.0], **options())
    assert set(found.items) == set(groups)
