"""Patches at every site equal plain hooks on transformers' own modules: every families, mode, position and strategy."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import models
from tests import sites
from tests.plain import ATTENTION, LAYOUTS, SITES
from tests.sites import (
    CORE,
    MODES,
    POSITIONS,
    STRATEGIES,
    Case,
    Out,
    Wanted,
    draw,
    exact,
    having,
    prompt,
)

QUICK = ("llama", "gemma2")
ONE_UNIT = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
SEES_IMAGES = ("llava", "idefics3", "qwen2_vl", "qwen3_vl", "gemma3_vl")
pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of the libraries, on families they no longer care for


@pytest.mark.parametrize(("name", "site"), having(*QUICK))
def test_every_site(families, random, name, site):
    """Each mode at other positions, by every strategy (of some families); rows patched late, or not at all."""
    one, ids = families(name), prompt(random)
    ways = STRATEGIES if name in CORE else ("auto", "batch")
    for mode, positions in zip(MODES, POSITIONS, strict=True):
        case = draw(one, site, random, n_tokens=len(ids), positions=positions, mode=mode)
        assert exact(one, ids, [case], strategies=ways) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "site"), having())
def test_every_mode_at_every_position(families, random, name, site):
    """Also values of each row, and prompts shorter than any window."""
    one = families(name)
    for mode, positions, n_tokens in itertools.product(MODES, POSITIONS, (4, 19)):
        ids = prompt(random, n_tokens)
        case = draw(one, site, random, n_tokens=n_tokens, positions=positions, mode=mode, per_row=True)
        exact(one, ids, [case])


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_no_strategy_is_refused(families, random, name, site):
    one, ids = families(name), prompt(random)
    assert exact(one, ids, [draw(one, site, random, n_tokens=len(ids))]) == len(STRATEGIES)


@pytest.mark.parametrize(("name", "site"), having("llama"))
def test_values_of_each_row_and_position(families, random, name, site):
    one, ids = families(name), prompt(random)
    for per_row, per_position in itertools.product((False, True), repeat=2):
        options = dict(positions=[4, -1, -3], per_row=per_row, per_position=per_position)
        exact(one, ids, [draw(one, site, random, n_tokens=len(ids), **options)])


@pytest.mark.parametrize(("name", "site"), having("llama"))
def test_how_values_may_be_given(families, random, name, site):
    """One row with values of each position; a number; of sites of one unit a vector."""
    one, ids = families(name), prompt(random)
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


@pytest.mark.parametrize(("name", "site"), having("llama"))
def test_how_units_may_be_given(families, random, name, site):
    one, ids = families(name), prompt(random)
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


@pytest.mark.parametrize(("name", "site"), having("llama", of=("llama", "gpt2", "qwen3", "gpt_neox", "mistral")))
def test_float64(families, random, name, site):
    one, ids = families(name, torch.float64), prompt(random)
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
def test_sites_that_a_family_has_not(families, random, name, site):
    """Refused in a sentence that names the site; everything else goes on."""
    one, ids = families(name), prompt(random)
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


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "llava")) for n in SEES_IMAGES])
def test_prompts_with_pictures(families, random, name):
    one = families(name)
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


def test_no_patches(families, random):
    for name in ("llama", "gpt2"):
        one, ids = families(name), prompt(random)
        want = Wanted(one, ids, [], 1)
        for got in (engine.patch(one.model, ids), engine.patch(one.model, ids, []), engine.patch(one.model, ids, None)):
            want.near(got)


def test_sites_of_attention_are_those_of_its_interface():
    assert {name for name, layout in LAYOUTS.items() if not layout.interface} == {
        "gptj", "falcon", "falcon_alibi", "bloom",
    }  # fmt: skip
    assert set(ATTENTION) < set(SITES)
