"""Patches at every site equal plain hooks on transformers' own modules: every family, mode, position and strategy."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import pad

import engine
import models
from tests import plain, sites
from tests.plain import ATTENTION, LAYOUTS, SITES
from tests.sites import MODES, POSITIONS, STRATEGIES, Case, Family, Function, Out, Wanted, draw, exact, prompt

QUICK = ("llama", "gemma2")
CORE = ("llama", "gpt2", "gemma2")
ONE_UNIT = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
SEES_IMAGES = ("llava", "idefics3", "qwen2_vl", "qwen3_vl", "gemma3_vl")
pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of the libraries, on families they no longer care for


def having(*some, of=tuple(LAYOUTS)):
    """Families and each of the sites they have; of those not in `some`, marked slow."""
    return [
        pytest.param(family, site, marks=[pytest.mark.slow] * (family not in some), id=f"{family}-{site}")
        for family in of
        for site in LAYOUTS[family].sites()
    ]


def every(*some):
    return [pytest.param(family, marks=[pytest.mark.slow] * (family not in some)) for family in LAYOUTS]


@pytest.fixture(scope="session")
def family():
    """A function of the name: made once."""
    known = {}

    def make(name, dtype=torch.float32):
        if (name, dtype) not in known:
            known[name, dtype] = Family(name, dtype)
        return known[name, dtype]

    return make


@pytest.mark.parametrize(("name", "site"), having(*QUICK))
def test_every_site(family, random, name, site):
    """Each mode at other positions, by every strategy (of some families); rows patched late, or not at all."""
    one, ids = family(name), prompt(random)
    ways = STRATEGIES if name in CORE else ("auto", "batch")
    for mode, positions in zip(MODES, POSITIONS, strict=True):
        case = draw(one, site, random, n_tokens=len(ids), positions=positions, mode=mode)
        assert exact(one, ids, [case], strategies=ways) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "site"), having())
def test_every_mode_at_every_position(family, random, name, site):
    """Also values of each row, and prompts shorter than any window."""
    one = family(name)
    for mode, positions, n_tokens in itertools.product(MODES, POSITIONS, (4, 19)):
        ids = prompt(random, n_tokens)
        case = draw(one, site, random, n_tokens=n_tokens, positions=positions, mode=mode, per_row=True)
        exact(one, ids, [case])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_no_strategy_is_refused(family, random, name, site):
    one, ids = family(name), prompt(random)
    assert exact(one, ids, [draw(one, site, random, n_tokens=len(ids))]) == len(STRATEGIES)


@pytest.mark.parametrize(("name", "site"), having("llama", "gpt2"))
def test_values_of_each_row_and_position(family, random, name, site):
    one, ids = family(name), prompt(random)
    for per_row, per_position in itertools.product((False, True), repeat=2):
        options = dict(positions=[4, -1, -3], per_row=per_row, per_position=per_position)
        exact(one, ids, [draw(one, site, random, n_tokens=len(ids), **options)])


@pytest.mark.parametrize(("name", "site"), having("llama", "gpt2"))
def test_how_values_may_be_given(family, random, name, site):
    """One row with values of each position; a number; of sites of one unit a vector."""
    one, ids = family(name), prompt(random)
    model, n = one.model, len(ids)
    case = draw(one, site, random, n_tokens=n, rows=1, positions=[-2, -1], per_position=True)
    want = Wanted(one, ids, [case], 1)
    for values in (case.values, case.values[0]):
        want.near(engine.patch(model, ids, engine.Patch(site, case.units, values, [-2, -1])))
        want.near(engine.patch(model, ids, [engine.Patch(site, case.units[0], values, [-2, -1])]))
    for mode, number in (("scale", 0.0), ("scale", -1.5), ("add", 0.5), ("replace", 0.25)):
        if site == "pattern" and mode != "scale":
            continue
        number_case = Case(site, draw(one, site, random, n_tokens=n).units, number, [-3, -1], mode)
        exact(one, ids, [number_case])
    whole = Case(site, case.units, 0, -1, "scale")  # an int
    Wanted(one, ids, [whole], 1).near(engine.patch(model, ids, whole.record))
    if site in ONE_UNIT:
        case = draw(one, site, random, n_tokens=n, mode="add")
        vector = torch.randn(case.values.shape[-1], generator=random)
        case.values = vector.expand_as(case.values)
        Wanted(one, ids, [case], 4).near(
            engine.patch(model, ids, engine.Patch(site, case.units, vector, mode="add")), "vector"
        )


@pytest.mark.parametrize(("name", "site"), having("llama", "gpt2"))
def test_how_units_may_be_given(family, random, name, site):
    one, ids = family(name), prompt(random)
    case = draw(one, site, random, n_tokens=len(ids), rows=1)
    pairs = [(int(layer), int(unit)) for layer, unit in case.units[0].nonzero()]
    forms = {"mask": case.units, "row": case.units[0], "pairs": pairs, "numpy": case.units.numpy()}
    if site in ONE_UNIT:
        forms |= {"layers": [layer for layer, _ in pairs], "by layer": case.units[..., 0]}
    want = Wanted(one, ids, [case], 1)
    for form, units in forms.items():
        for patch in (engine.patch, engine.naive.patch):
            want.near(patch(one.model, ids, engine.Patch(site, units, case.values[0, 0])), form)
    if site in ONE_UNIT:
        case = draw(one, site, random, n_tokens=len(ids), rows=5)
        got = engine.patch(one.model, ids, engine.Patch(site, case.units[..., 0], case.values[0, 0]))
        Wanted(one, ids, [case], 5).near(got, "rows by layer")


@pytest.mark.parametrize(("name", "site"), having("llama", "gpt2"))
def test_patches_of_one_site_act_in_the_order_given(family, random, name, site):
    one, ids = family(name), prompt(random)
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


@pytest.mark.parametrize("name", every("llama", "gemma2", "gpt_oss", "bloom"))
def test_all_sites_at_once(family, random, name):
    """Whatever the order in which they are given; those of one row hold for all rows."""
    one, ids = family(name), prompt(random)
    cases = []
    for i, site in enumerate(one.sites):
        rows, positions = (4, 1)[i % 2], POSITIONS[:2][i % 2]
        case = draw(one, site, random, n_tokens=len(ids), rows=rows, positions=positions, mode=MODES[i % 3])
        cases.append(case)
    exact(one, ids, cases)
    exact(one, ids, cases[::-1], strategies=("auto", "batch"))
    exact(one, ids, cases[1::2], rows=1, strategies=("auto", "batch"))


@pytest.mark.parametrize(("name", "site"), having("llama", "gpt2"))
def test_two_sites(family, random, name, site):
    """Each beside the next one in a block."""
    one, ids = family(name), prompt(random)
    other = one.sites[(one.sites.index(site) + 1) % len(one.sites)]
    first = draw(one, other, random, n_tokens=len(ids), rows=1, positions=[-2, -1])
    exact(one, ids, [first, draw(one, site, random, n_tokens=len(ids), mode="add")], strategies=("auto", "packed"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_heads_are_short_for_a_patch_at_z(family, random, name):
    """Appended last, with the call's positions and mode; the other patches keep their own."""
    one, ids = family(name), prompt(random)
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


@pytest.mark.parametrize("name", every("llama", "gemma2", "opt", "gpt_oss"))
def test_knockouts(family, random, name):
    one, ids = family(name), prompt(random)
    if not LAYOUTS[name].interface:
        with pytest.raises(models.UnsupportedModelError):
            engine.patch(one.model, ids, engine.Knockout(None, [0]))
        return
    sizes = one.sizes("scores", 1)[:2]
    heads = draw(one, "scores", random, n_tokens=len(ids)).units
    cases = [
        (Out(None, [-4], -1, sizes), 1),
        (Out(None, [0, 2], [-1, -3], sizes), 1),
        (Out(heads, [5, 0, -2], -1), 4),
        (Out(heads, [[0], [-5], [3, 4, 5], [1]], [-3, -1]), 4),
        (Out(None, [[6], [7, 8]], [9, 10], sizes), 2),
        (Out(None, [list(range(11)), [-2]], -1, sizes), 2),  # only itself is left
    ]
    unpatched = engine.patch(one.model, ids)
    for case, rows in cases:
        exact(one, ids, [case], rows=rows)
        assert (engine.patch(one.model, ids, case.record)[0] - unpatched).abs().max() > 1e-4
    got = engine.patch(one.model, ids, engine.Knockout([(1, 0), (2, 3)], [4, 5]))
    mask = torch.zeros(1, *sizes, dtype=torch.bool)
    mask[0, 1, 0] = mask[0, 2, 3] = True
    Wanted(one, ids, [Out(mask, [4, 5], -1)], 1).near(got)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_knockouts_beside_patches(family, random, name):
    """Scores added to, and those of a key taken out, before or after; other sites; heads."""
    one, ids = family(name), prompt(random)
    n, sizes = len(ids), one.sizes("scores", 1)[:2]
    out = Out(draw(one, "scores", random, n_tokens=n).units, [[0], [2], [3], [4]], [-2, -1])
    added = draw(one, "scores", random, n_tokens=n, mode="add", positions=-1)
    others = [draw(one, site, random, n_tokens=n, rows=1) for site in ("resid_post", "k", "z")]
    exact(one, ids, [out, added])
    exact(one, ids, [added, out])
    exact(one, ids, [*others, out])
    exact(one, ids, [Out(None, [1, 6], -1, sizes), draw(one, "pattern", random, n_tokens=n), *others])
    exact(one, ids, [Out(None, [1], -1, sizes), Out(None, [[2], [3], [1, 5], [0]], -1, sizes)])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_what_is_not_seen_stays_so(family, random, name):
    """Numbers of scores for tokens after the token itself, or beyond its window, do nothing."""
    one, ids = family(name), prompt(random, 15)
    mask = torch.ones(1, *one.sizes("scores", 1)[:2], dtype=torch.bool)
    values = torch.randn(1, 1, *one.sizes("scores", 15), generator=random)
    unseen = torch.arange(15) > 10
    got = []
    for noise in (0.0, 9.0):
        case = Case("scores", mask, values + noise * unseen, [10, -2], "replace")
        exact(one, ids, [case], rows=1)
        got.append(engine.patch(one.model, ids[:11], engine.Patch("scores", mask, case.values[0, 0, ..., :11])))
    torch.testing.assert_close(*got, atol=1e-5, rtol=0)
    uniform = Case("scores", mask, 0.0, [4, -1], "scale")
    exact(one, ids, [uniform], rows=1)


def folded(layer, x):
    """No site's own; of tokens and rows one by one."""
    return x * (0.5 + 0.1 * layer) + 0.1 * x.square().clamp(max=4).mean(-1, keepdim=True)


def halved(layer, x):
    return x * (0.5 + 0.1 * layer)


@pytest.mark.parametrize(("name", "site"), having("llama", "gpt2"))
def test_edits(family, random, name, site):
    one, ids = family(name), prompt(random)
    function = halved if site in ("scores", "pattern") else folded
    for layers, positions in (([0, 2], -1), ([1], [-4, -1]), ([2, 1, 0], 0)):
        exact(one, ids, [Function(site, layers, function, positions)], rows=1)
    beside = [draw(one, other, random, n_tokens=len(ids)) for other in ("z", site)]
    exact(one, ids, [beside[0], Function(site, [1, 2], function, [-2, -1]), beside[1]])
    exact(one, ids, [beside[0], Function(site, [1, 2], function, [-2, -1], rows=4), beside[1]])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_an_edit_is_given(family, random, strategy):
    """Of its layers alone, and of every row, its positions with what comes before: a tensor that it may write to."""
    one, ids = family("llama"), prompt(random)
    seen = {}

    def write(layer, x):
        assert x.ndim == 4
        assert x.shape[2:] == (80, 1)
        seen.setdefault(layer, []).extend(x.flatten(0, 1).squeeze(-1).clone())
        x[:] = 0
        return x

    q = draw(one, "q", random, n_tokens=len(ids), positions=2)
    asked = [q.record, engine.Edit("mlp_act", [0, 2], write, rows=4, positions=[-1, 3])]
    got = engine.patch(one.model, ids, asked, strategy=strategy)
    nothing = Case("mlp_act", torch.tensor([1, 0, 1]).bool()[None, :, None].expand(1, 3, 80), 0.0, [-1, 3], "scale")
    Wanted(one, ids, [q, nothing], 4).near(got)
    assert set(seen) == {0, 2}
    for row in range(4):
        changes = q.of(row, len(ids)) + nothing.of(row, len(ids))[1:]  # but the first, which is looked for here
        with torch.no_grad():
            x = plain.activations(one.same, "llama", ids, ["mlp_act"], changes)["mlp_act"]
        for token in (-1, 3):
            assert min((x[0, token, :, 0] - given).abs().max() for given in seen[0]) < 1e-5


@pytest.mark.parametrize("name", every("llama", "gpt2", "mixtral", "bloom"))
def test_prompts_of_several_lengths(family, random, name):
    one = family(name)
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
def test_prompts_of_one_length(family, random, site):
    """A number for each token, of each prompt."""
    one = family("llama")
    prompts = [prompt(random, 9) for _ in range(3)]
    case = draw(one, site, random, n_tokens=9, positions=[-2, -1], per_row=True)
    for strategy in STRATEGIES:
        for ids, rows in zip(prompts, engine.patch(one.model, prompts, case.record, strategy=strategy), strict=True):
            Wanted(one, ids, [case], 4).near(rows, strategy)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_on_prefixes(family, random, name):
    """Computed once, for several calls at several sites."""
    one, ids = family(name), prompt(random)
    prefix = engine.prefill(one.model, ids)
    for site in one.sites:
        case = draw(one, site, random, n_tokens=len(ids), positions=-1, mode="add")
        Wanted(one, ids, [case], 4).near(engine.patch(one.model, prefix, case.record), site)


@pytest.mark.parametrize("name", every("llama", "gemma2"))
def test_after_other_calls(family, random, name):
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
def test_rows_in_several_passes(family, random, monkeypatch, site):
    """More rows than one forward takes."""
    one, ids = family("llama"), prompt(random)
    case = draw(one, site, random, n_tokens=len(ids), rows=9, positions=[-2, -1], per_row=True)
    monkeypatch.setattr("engine.core.planning.MAX_TOKENS", 20)
    exact(one, ids, [case, draw(one, "mlp_out", random, n_tokens=len(ids), rows=1)], rows=9)


@pytest.mark.parametrize(
    ("name", "site"), having("llama", "gpt2", of=("llama", "gpt2", "qwen3", "gpt_neox", "mistral"))
)
def test_float64(family, random, name, site):
    one, ids = family(name, torch.float64), prompt(random)
    for mode, positions in zip(MODES, POSITIONS, strict=True):
        case = draw(one, site, random, n_tokens=len(ids), positions=positions, mode=mode)
        if isinstance(case.values, torch.Tensor):
            case.values = case.values.double()
        want = sites.oracle(one.double, name, ids, [case], 4)
        for strategy in STRATEGIES:
            got = engine.patch(one.model, ids, case.record, strategy=strategy)
            torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        pytest.param(name, site, marks=[pytest.mark.slow] * (name not in (*QUICK, "falcon", "bloom")))
        for name, layout in LAYOUTS.items()
        for site in SITES
        if site not in layout.sites()
    ],
)
def test_sites_that_a_family_has_not(family, random, name, site):
    """Refused in a sentence that names the site; everything else goes on."""
    one, ids = family(name), prompt(random)
    for call in (
        lambda: engine.patch(one.model, ids, engine.Patch(site, [], 0.0, mode="scale")),
        lambda: engine.patch(one.model, ids, engine.Patch(site, [(0, 0)], 0.0, mode="scale")),
        lambda: engine.naive.patch(one.model, ids, engine.Edit(site, [0], lambda layer, x: x)),
        lambda: engine.capture(one.model, [ids], sites=("z", site)),
    ):
        with pytest.raises(models.UnsupportedModelError) as caught:
            call()
        assert site in str(caught.value)
        assert len(str(caught.value).split()) >= 6
    exact(one, ids, [draw(one, "resid_post", random, n_tokens=len(ids))], strategies=("auto",))


# Captured.


@torch.no_grad()
def looked_at(one, prompts, at, wanted, changes=()):
    """By site, [prompts, positions, layers, units, width], in float64; and what rounding makes of it."""
    found = []
    for hf in (one.double, one.same):
        by_prompt = [plain.activations(hf, one.name, ids, wanted, changes) for ids in prompts]
        each = {s: [x[s].transpose(0, 1)[at].double() for x in by_prompt] for s in wanted}
        most = {s: max(x.shape[-1] for x in each[s]) for s in wanted}
        found.append({s: torch.stack([pad(x, (0, most[s] - x.shape[-1])) for x in each[s]]) for s in wanted})
    return found


def alike(got, want, own):
    assert got.shape == want.shape
    assert torch.equal(got.isfinite(), want.isfinite())
    seen = want.isfinite()
    rounding = (want[seen] - own[seen]).abs().max()
    assert (got.double()[seen] - want[seen]).abs().max() <= sites.LIMIT + 2 * rounding


@pytest.mark.parametrize("name", every("llama", "gpt2", "gemma2", "mixtral", "bloom"))
def test_captured_at_every_site(family, random, name):
    """All at once, and one by one; at one position and at several."""
    one = family(name)
    prompts = [prompt(random, 9) for _ in range(3)]
    want, own = looked_at(one, prompts, [-1, 4, 0], one.sites)
    got = engine.capture(one.model, prompts, [-1, 4, 0], sites=tuple(one.sites))
    assert set(got) == set(one.sites)
    for site in one.sites:
        alike(got[site], want[site], own[site])
        alone = engine.capture(one.model, prompts, 4, sites=(site,))
        assert set(alone) == {site}
        alike(alone[site], want[site][:, 1], own[site][:, 1])
        alike(engine.capture(one.model, prompts, [4], sites=site), want[site][:, 1:2], own[site][:, 1:2])
    alike(engine.capture(one.model, prompts, [-1, 4, 0]), want["z"], own["z"])


@pytest.mark.parametrize("name", every("llama", "gpt2", "bloom"))
def test_captured_of_prompts_of_several_lengths(family, random, name):
    """Attention is padded with zeros, to the longest."""
    one = family(name)
    prompts = [prompt(random, n) for n in (3, 11, 6, 3)]
    some = tuple(one.sites)
    want, own = looked_at(one, prompts, [-1, 0], some)
    got = engine.capture(one.model, prompts, [-1, 0], sites=some)
    for site in some:
        alike(got[site], want[site], own[site])


@pytest.mark.parametrize("name", every("llama", "gemma2", "bloom"))
def test_captured_under_patches(family, random, name):
    """What is there with the patches, row by row; at their own sites what they put there."""
    one = family(name)
    prompts = [prompt(random, 9) for _ in range(2)]
    cases = [
        draw(one, site, random, n_tokens=9, rows=rows, positions=positions, mode=mode)
        for site, rows, positions, mode in (
            ("resid_pre", 3, 2, "add"),
            ("z", 1, [-3, -1], "replace"),
            ("mlp_out", 3, -1, "scale"),
        )
    ]
    if LAYOUTS[name].interface:
        cases += [draw(one, "k", random, n_tokens=9, rows=1, positions=3)]
        cases += [Out(None, [[0], [1], [2, 3]], 4, one.sizes("z", 1)[:2])]
    changes = [[change for case in cases for change in case.of(row, 9)] for row in range(3)]
    each = [looked_at(one, prompts, [-1, 4, 2], one.sites, some) for some in changes]
    want, own = ({site: torch.stack([row[i][site] for row in each], 1) for site in one.sites} for i in (0, 1))
    records = [case.record for case in cases]
    got = engine.capture(one.model, prompts, [-1, 4, 2], sites=tuple(one.sites), patches=records)
    for site in one.sites:
        alike(got[site], want[site], own[site])  # [prompts, rows, positions, layers, units, width]
    alike(engine.capture(one.model, prompts, [-1, 4, 2], patches=records), want["z"], own["z"])
    alike(engine.capture(one.model, prompts, 4, patches=records), want["z"][:, :, 1], own["z"][:, :, 1])


def test_means_of_sites(family, random):
    one = family("llama")
    prompts = [prompt(random, n) for n in (4, 9, 5)]
    some = ("resid_mid", "q", "mlp_act")
    want, own = looked_at(one, prompts, [-1], some)
    got = engine.mean_activations(one.model, prompts, sites=some, progress=False)
    assert set(got) == set(some)
    for site in some:
        alike(got[site], want[site][:, 0].mean(0), own[site][:, 0].mean(0))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_captured_activation_patched_in_is_that_of_the_other_prompt(family, random, name):
    """resid_post of the last token at a layer decides, if all that it sees later is the same."""
    one = family(name)
    a, b = prompt(random, 8), prompt(random, 8)
    got = engine.capture(one.model, [a], list(range(8)), sites=("resid_pre",))["resid_pre"]  # [1, P, L, 1, W]
    patched = engine.patch(one.model, b, engine.Patch("resid_pre", [1], got, list(range(8))))
    torch.testing.assert_close(patched, engine.patch(one.model, a), atol=2e-5, rtol=0)


# Answers.


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answers(family, random, name):
    """Greedy by hand: the whole sequence again for each token."""
    one = family(name)
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


# Pictures.


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "llava")) for n in SEES_IMAGES])
def test_prompts_with_pictures(family, random, name):
    one = family(name)
    noise = np.random.default_rng(0)
    picture = Image.fromarray(noise.integers(0, 255, (28, 28, 3), dtype=np.uint8))
    text = f"Q: {models.IMAGE} which?\nA:"
    marked = text.replace(models.IMAGE, models.tiny.image_marker(name))
    inputs = dict(models.tiny.tiny_processor(name)(text=[marked], images=[picture], return_tensors="pt"))
    ids = inputs.pop("input_ids")[0].tolist()
    seen = models.Prompt(text, (picture,))
    assert one.model.encode(seen).tolist() == ids
    for i, site in enumerate(one.sites):
        mode, positions = MODES[i % 3], POSITIONS[i % 2]
        case = draw(one, site, random, n_tokens=len(ids), positions=positions, mode=mode)
        want = Wanted(one, ids, [case], 4, **inputs)
        for strategy in ("auto", "expanded", "batch"):
            try:
                want.near(engine.patch(one.model, seen, case.record, strategy=strategy), site, strategy)
            except models.UnsupportedModelError:
                assert strategy == "expanded"
    if name != "gemma3_vl":  # whose tokens of a picture see each other
        want = Wanted(one, ids, [Out(None, [4, 5], -1, one.sizes("z", 1)[:2])], 1, **inputs)
        want.near(engine.patch(one.model, seen, engine.Knockout(None, [4, 5])))


# Anything.


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
def test_any_patches(family, seed):
    random = torch.Generator().manual_seed(seed)
    names = CORE if seed < 30 else tuple(LAYOUTS)
    one = family(names[seed % len(names)])
    n_tokens = int(torch.randint(2, 22, (1,), generator=random))
    ids = prompt(random, n_tokens)
    cases, rows = anything(one, random, n_tokens)
    rows = max([rows] + [case.rows for case in cases if isinstance(case, Function)])
    exact(one, ids, cases, rows)


def test_no_patches(family, random):
    for name in ("llama", "gpt2"):
        one, ids = family(name), prompt(random)
        want = Wanted(one, ids, [], 1)
        for got in (engine.patch(one.model, ids), engine.patch(one.model, ids, []), engine.patch(one.model, ids, None)):
            want.near(got)


def test_sites_of_attention_are_those_of_its_interface():
    assert {name for name, layout in LAYOUTS.items() if not layout.interface} == {
        "gptj", "falcon", "falcon_alibi", "bloom",
    }  # fmt: skip
    assert set(ATTENTION) < set(SITES)
