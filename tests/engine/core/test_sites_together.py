"""Patches at several sites, of several prompts, after other calls, and at random equal plain hooks."""

import pytest
import torch

import engine
import models
from tests import plain, sites
from tests.plain import LAYOUTS, SITES
from tests.sites import (
    CORE,
    MODES,
    POSITIONS,
    STRATEGIES,
    Case,
    Family,
    Function,
    Out,
    Wanted,
    draw,
    every,
    exact,
    halved,
    having,
    prompt,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of the libraries, on families they no longer care for


@pytest.mark.parametrize(("name", "site"), having("llama", "gpt2"))
def test_patches_of_one_site_act_in_the_order_given(families, random, name, site):
    one, ids = families(name), prompt(random)
    n = len(ids)
    first = draw(one, site, random, n_tokens=n, positions=[-3, -1], mode="replace")
    second = draw(one, site, random, n_tokens=n, positions=-1, mode="add")
    third = draw(one, site, random, n_tokens=n, positions=[-1, -2], mode="scale", per_row=True)
    for case in (first, second, third):
        case.units[:] = True  # all meet
    results = []
    for order in ((first, second, third), (second, third, first), (third, second, first)):
        exact(one, ids, order, strategies=("auto", "batch"))
        results.append(engine.patch(one.model, ids, [case.record for case in order])[0])
    assert (results[0] - results[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", every("llama", "gemma2", "bloom"))
def test_all_sites_at_once(families, random, name):
    """Whatever the order in which they are given; those of one row hold for all rows."""
    one, ids = families(name), prompt(random)
    cases = []
    for i, site in enumerate(one.sites):
        rows, positions = (4, 1)[i % 2], POSITIONS[:2][i % 2]
        case = draw(one, site, random, n_tokens=len(ids), rows=rows, positions=positions, mode=MODES[i % 3])
        cases.append(case)
    exact(one, ids, cases)
    exact(one, ids, cases[::-1], strategies=("auto", "batch"))
    exact(one, ids, cases[1::2], rows=1, strategies=("auto", "batch"))


@pytest.mark.parametrize(("name", "site"), having("llama", "gpt2"))
def test_two_sites(families, random, name, site):
    """Each beside the next one in a block."""
    one, ids = families(name), prompt(random)
    other = one.sites[(one.sites.index(site) + 1) % len(one.sites)]
    first = draw(one, other, random, n_tokens=len(ids), rows=1, positions=[-2, -1])
    exact(one, ids, [first, draw(one, site, random, n_tokens=len(ids), mode="add")], strategies=("auto", "packed"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_heads_are_short_for_a_patch_at_z(families, random, name):
    """Appended last, with the call's positions and mode; the other patches keep their own."""
    one, ids = families(name), prompt(random)
    n = len(ids)
    before = draw(one, "z", random, n_tokens=n, positions=[-2, -1], mode="add")
    short = draw(one, "z", random, n_tokens=n, positions=[-1, -4])
    other = draw(one, "resid_mid", random, n_tokens=n, rows=1, mode="add")
    options = dict(heads=short.units, values=short.values[0, 0], positions=[-1, -4])
    for patch in (engine.patch, engine.naive.patch):
        Wanted(one, ids, [short], 4).near(patch(one.model, ids, **options))
        got = patch(one.model, ids, [before.record, other.record], **options)
        Wanted(one, ids, [before, other, short], 4).near(got)
        got = patch(one.model, ids, patches=other.record, heads=short.units, values=short.values[0, 0], mode="add")
        Wanted(one, ids, [other, Case("z", short.units, short.values, -1, "add")], 4).near(got)


@pytest.mark.parametrize("name", every("llama", "gpt2", "mixtral", "bloom"))
def test_prompts_of_several_lengths(families, random, name):
    one = families(name)
    prompts = [prompt(random, n) for n in (5, 14, 5, 8)]
    cases = [
        draw(one, site, random, n_tokens=5, rows=rows, positions=positions, mode=mode)
        for site, rows, positions, mode in (
            ("resid_post", 3, -1, "add"),
            ("z", 3, [-3, -1], "replace"),
            ("mlp_out", 1, [2, -1], "scale"),
        )
    ]
    if LAYOUTS[name].interface:
        cases += [
            draw(one, "v", random, n_tokens=5, rows=3, positions=[1]),
            Case("pattern", torch.ones(1, *one.sizes("pattern", 1)[:2], dtype=torch.bool), 0.5, -1, "scale"),
            Out(None, [[0], [1], [-2]], -1, one.sizes("scores", 1)[:2]),
        ]
    records = [case.record for case in cases]
    wanted = [Wanted(one, ids, cases, 3) for ids in prompts]
    for strategy in ("auto", "packed", "expanded", "batch", "naive"):
        try:
            got = engine.patch(one.model, prompts, records, strategy=strategy)
        except models.UnsupportedModelError:
            assert strategy in ("packed", "expanded")
            continue
        assert got.shape == (4, 3, one.model.shape.vocab_size)
        for rows, want in zip(got, wanted, strict=True):
            want.near(rows, strategy)
    for rows, want in zip(engine.naive.patch(one.model, prompts, records), wanted, strict=True):
        want.near(rows)


@pytest.mark.parametrize("site", ["q", "scores", "pattern", "resid_mid"])
def test_prompts_of_one_length(families, random, site):
    """A number for each token, of each prompt."""
    one = families("llama")
    prompts = [prompt(random, 9) for _ in range(3)]
    case = draw(one, site, random, n_tokens=9, positions=[-2, -1], per_row=True)
    for strategy in STRATEGIES:
        for ids, rows in zip(prompts, engine.patch(one.model, prompts, case.record, strategy=strategy), strict=True):
            Wanted(one, ids, [case], 4).near(rows, strategy)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_on_prefixes(families, random, name):
    """Computed once, for several calls at several sites."""
    one, ids = families(name), prompt(random)
    prefix = engine.prefill(one.model, ids)
    for site in one.sites:
        case = draw(one, site, random, n_tokens=len(ids), positions=-1, mode="add")
        Wanted(one, ids, [case], 4).near(engine.patch(one.model, prefix, case.record), site)


@pytest.mark.parametrize("name", every("llama"))
def test_after_other_calls(families, random, name):
    """The same results whatever was asked before; and the model is left as it was."""
    one, ids = Family(name), prompt(random)
    n, hf = len(ids), one.model.hf
    attention = [config._attn_implementation for config in plain._configs(hf)]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in m.__dict__) for m in hf.modules()]
    cases = [draw(one, site, random, n_tokens=n, positions=[-2, -1], mode="add") for site in one.sites]
    wanted = [Wanted(one, ids, [case], 4) for case in cases]
    unpatched = Wanted(one, ids, [], 1)
    for round_ in range(3):
        for i in torch.randperm(len(cases), generator=random).tolist():
            strategy = STRATEGIES[(i + round_) % len(STRATEGIES)]
            wanted[i].near(engine.patch(one.model, ids, cases[i].record, strategy=strategy), one.sites[i])
            if i % 4 == 0:
                unpatched.near(engine.patch(one.model, ids))
                engine.capture(one.model, [ids, ids[:5]])
                engine.patch(one.model, ids[:6], engine.Knockout(None, [0]))
        with pytest.raises(ZeroDivisionError):
            engine.patch(one.model, ids, engine.Edit(one.sites[round_], [1], lambda layer, x: x / (0 // 0)))
    assert [config._attn_implementation for config in plain._configs(hf)] == attention
    after = [(len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in m.__dict__) for m in hf.modules()]
    assert after == hooks
    unpatched.near(plain.logits(hf, name, ids)[None])


@pytest.mark.parametrize("site", SITES)
def test_rows_in_several_passes(families, random, monkeypatch, site):
    """More rows than one forward takes."""
    one, ids = families("llama"), prompt(random)
    case = draw(one, site, random, n_tokens=len(ids), rows=9, positions=[-2, -1], per_row=True)
    monkeypatch.setattr("engine.core.planning.MAX_TOKENS", 20)
    exact(one, ids, [case, draw(one, "mlp_out", random, n_tokens=len(ids), rows=1)], rows=9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answers(families, random, name):
    """Greedy by hand: the whole sequence again for each token."""
    one = families(name)
    ids = one.model.encode("Q: hot\nA:").tolist()
    start = len(ids)
    cases = [
        draw(one, "resid_post", random, n_tokens=start, rows=1, mode="add"),
        draw(one, "mlp_out", random, n_tokens=start, rows=1, mode="replace"),
        draw(one, "v", random, n_tokens=start, rows=1, mode="scale"),
        Out(None, [0, 2], -1, one.sizes("z", 1)[:2]),
    ]
    said = set()
    for patched in ("prompt", "all"):
        found = list(ids)
        for _ in range(6):
            for case in cases:
                case.positions = list(range(start - 1, len(found))) if patched == "all" else [start - 1]
            logits = sites.oracle(one.same, name, found, cases, 1)[0]
            found.append(int(logits.argmax()))
        for case in cases:
            case.positions = -1
        want = one.model.decode(torch.tensor(found[start:]))
        records = [case.record for case in cases]
        got = engine.generate(one.model, "Q: hot\nA:", records, patched=patched, max_new_tokens=6)
        assert got == want
        said.add(got)
    assert len(said) == 2


def anything(one, random, n_tokens):
    """Patches, knockouts and edits at random, some of one row; how many rows there are."""

    def number(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=random))

    rows, cases = number(1, 5), []
    for _ in range(number(1, 4)):
        some = torch.randperm(n_tokens, generator=random)[: number(1, min(3, n_tokens))].tolist()
        positions = some[0] if number(0, 1) else [p - n_tokens * number(0, 1) for p in some]
        kind, own = number(0, 9), (rows, 1)[number(0, 2) == 0]
        at = min(p % n_tokens for p in sites.listed(positions))
        if kind == 0 and at > 0 and LAYOUTS[one.name].interface:
            keys = torch.randperm(at, generator=random)[: number(1, 3)].tolist()
            heads = draw(one, "scores", random, n_tokens=n_tokens, rows=own).units
            cases.append(Out(heads, keys, positions))
        elif kind == 1:
            layers = torch.randperm(one.n_layers, generator=random)[: number(1, 3)].tolist()
            cases.append(Function(one.sites[number(0, len(one.sites) - 1)], layers, halved, positions, own))
        else:
            site, mode = one.sites[number(0, len(one.sites) - 1)], MODES[number(0, 2)]
            options = dict(per_row=bool(number(0, 1)), per_position=bool(number(0, 1)))
            cases.append(
                draw(one, site, random, n_tokens=n_tokens, rows=own, positions=positions, mode=mode, **options)
            )
    return cases, max(len(getattr(case, "units", getattr(case, "heads", [0]))) for case in cases)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= 8)) for seed in range(400)])
def test_any_patches(families, seed):
    random = torch.Generator().manual_seed(seed)
    names = CORE if seed < 30 else tuple(LAYOUTS)
    one = families(names[seed % len(names)])
    n_tokens = int(torch.randint(2, 22, (1,), generator=random))
    ids = prompt(random, n_tokens)
    cases, rows = anything(one, random, n_tokens)
    rows = max([rows] + [case.rows for case in cases if isinstance(case, Function)])
    exact(one, ids, cases, rows)
