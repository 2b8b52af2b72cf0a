"""Patches that cannot be: refused by the documented exception before anything runs, the model left as it was."""

import pytest
import torch

import engine
import models
from models import zoo
from tests.refusal import MASK, VALUES, nan_at, refused

# The tiny llama: 3 layers of 6 heads and 2 key-value heads of 8, 48 wide, 80 neurons. Prompts have ten tokens.
SITES = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_act", "z", "q", "k", "v", "scores", "pattern",
)  # fmt: skip
PROMPT = "0123456789"
VERBS = {
    "patch": engine.patch,
    "naive": engine.naive.patch,
    "generate": lambda model, prompt, patches: engine.generate(model, prompt, patches, max_new_tokens=2),
    "capture": lambda model, prompt, patches: engine.capture(model, [prompt], patches=patches),
}
verbs = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
pytestmark = pytest.mark.filterwarnings("ignore:.*")


def mask(*shape):
    return torch.ones(shape, dtype=torch.bool)


def one(layers=3, width=48):
    return torch.zeros(layers, 1, width)


@pytest.fixture(scope="module")
def before(model):
    """What good patches say; every site has been found."""
    engine.capture(model, [PROMPT], sites=SITES)
    return engine.patch(model, PROMPT, good())


def good():
    uniform = torch.full((3, 6, 10), 0.1)
    return [
        engine.Patch("resid_mid", [1], torch.ones(48), mode="add"),
        engine.Patch("pattern", [(2, 0)], uniform),
        engine.Knockout([(1, 3)], [0, 4]),
    ]


@pytest.fixture(autouse=True)
def _works_afterwards(model, before):
    yield
    assert torch.equal(engine.patch(model, PROMPT, good()), before)


UNITS = {
    "too few heads": ("z", mask(2, 3, 5), ValueError, ("[2, 3, 5]", "3, 6]")),
    "query heads at keys": ("k", mask(2, 3, 6), ValueError, ("[2, 3, 6]", "3, 2]")),
    "too many layers": ("q", mask(4, 6), ValueError, ("[4, 6]", "[3, 6]")),
    "layers of a vector": ("resid_post", mask(2, 4), ValueError, ("4]", "3, 1]")),
    "units of a vector": ("mlp_out", mask(2, 3, 2), ValueError, ("[2, 3, 2]", "3, 1]")),
    "neurons": ("mlp_act", mask(3, 79), ValueError, ("[3, 79]", "3, 80]")),
    "one dimension": ("z", mask(6), ValueError, ("[6]", "[3, 6]")),
    "four dimensions": ("v", mask(1, 2, 3, 2), ValueError, ("[1, 2, 3, 2]", "3, 2]")),
    "no rows": ("z", mask(0, 3, 6), ValueError, ("[0, 3, 6]",)),
    "int mask": ("q", mask(3, 6).long(), TypeError, ("torch.int64", "bool")),
    "layer too high": ("resid_pre", [0, 3], IndexError, ("layer 3", "0..2")),
    "layer negative": ("attn_out", [-1], IndexError, ("layer -1", "0..2")),
    "layer of a pair": ("scores", [(3, 0)], IndexError, ("layer 3", "0..2")),
    "head too high": ("pattern", [(2, 6)], IndexError, ("6", "0..5")),
    "key head too high": ("k", [(0, 2)], IndexError, ("2", "0..1")),
    "neuron too high": ("mlp_act", [(0, 79), (1, 80)], IndexError, ("80", "0..79")),
    "unit of a vector": ("resid_mid", [(0, 1)], IndexError, ("1", "0..0")),
    "head negative": ("q", [(0, -1)], IndexError, ("-1", "0..5")),
    "triple": ("z", [(0, 1, 2)], TypeError, ("(0, 1, 2)",)),
    "fraction": ("resid_post", [0.5], TypeError, ("0.5",)),
    "layers of heads": ("z", [0, 1], TypeError, ("0",)),
    "text": ("z", "ab", TypeError, ("'ab'",)),
    "none in list": ("mlp_out", [None], TypeError, ("None",)),
    "a number": ("resid_post", 1, TypeError, ("1",)),
}


@verbs
@pytest.mark.parametrize(("site", "units", "error", "words"), UNITS.values(), ids=UNITS)
def test_units(model, verb, site, units, error, words):
    with refused(model, error, *words):
        verb(model, PROMPT, engine.Patch(site, units, 0.0, mode="scale"))


@verbs
@pytest.mark.parametrize("site", ["resid", "Z", "", None, 3, "hook_z", "mlp"])
def test_sites(model, verb, site):
    with refused(model, ValueError, repr(site), *SITES):
        verb(model, PROMPT, engine.Patch(site, [(0, 0)], 0.0))
    with refused(model, ValueError, repr(site), *SITES):
        verb(model, PROMPT, [*good(), engine.Edit(site, [0], lambda layer, x: x)])


def test_sites_to_capture(model):
    with refused(model, ValueError, "'resid'", *SITES):
        engine.capture(model, [PROMPT], sites=("z", "resid"))
    with refused(model, ValueError, "'resid'", *SITES):
        engine.mean_activations(model, [PROMPT], sites=("resid",), progress=False)
    with refused(model, ValueError, "'resid'", *SITES):
        engine.capture(model, [PROMPT], sites="resid")
    with refused(model, IndexError, "position 10 ", "10 tokens"):
        engine.capture(model, [PROMPT], [0, 10], sites=("q", "pattern"))


@pytest.mark.parametrize(
    ("family", "site"), [("gpt_neox", "resid_mid"), ("mixtral", "mlp_act"), ("bloom", "q"), ("bloom", "pattern")]
)
def test_sites_that_the_model_has_not(tiny, family, site):
    other = tiny(family)

    def calls(site):
        patch = engine.Patch(site, [(0, 0)], 0.0, mode="scale")
        yield from (lambda verb=verb: verb(other, PROMPT, patch) for verb in VERBS.values())
        yield lambda: engine.capture(other, [PROMPT], sites=(site,))

    with pytest.raises(models.UnsupportedModelError):  # looked for here
        engine.patch(other, PROMPT, engine.Patch(site, [(0, 0)], 0.0))
    if family == "bloom":
        with pytest.raises(models.UnsupportedModelError):
            engine.patch(other, PROMPT, engine.Knockout(None, [0]))
    for call in calls(site):
        with refused(other, models.UnsupportedModelError, site, other.name):
            call()
    if family == "bloom":
        with refused(other, models.UnsupportedModelError, other.name):
            engine.patch(other, PROMPT, engine.Knockout(None, [0]))


RESIDUAL = {
    "missing": (None, ValueError, ("values", "48")),
    "list": ([[1.0]], TypeError, ("list",)),
    "int": (one().long(), TypeError, ("torch.int64",)),
    "bool": (True, TypeError, ("bool",)),
    "text": ("ab", TypeError, ("str",)),
    "vector of another length": (torch.zeros(47), ValueError, ("[47]", "48]")),
    "width": (one(width=47), ValueError, ("[3, 1, 47]", "48]")),
    "layers": (one(layers=2), ValueError, ("[2, 1, 48]", "[3, 1, 48]")),
    "units": (torch.zeros(3, 2, 48), ValueError, ("[3, 2, 48]", "[3, 1, 48]")),
    "without units": (torch.zeros(3, 48), ValueError, ("[3, 48]", "[3, 1, 48]")),
    "rows": (torch.zeros(3, 3, 1, 48), ValueError, ("[3, 3, 1, 48]", "[2, 3, 1, 48]")),
    "positions": (torch.zeros(1, 3, 3, 1, 48), ValueError, ("[1, 3, 3, 1, 48]", "2")),
    "rows beside positions": (torch.zeros(3, 2, 3, 1, 48), ValueError, ("[3, 2, 3, 1, 48]", "2")),
    "six dimensions": (torch.zeros(1, 2, 2, 3, 1, 48), ValueError, ("[1, 2, 2, 3, 1, 48]",)),
    "nan": (nan_at(1, 0, 4, shape=(3, 1, 48)), ValueError, ("NaN", "layer 1")),
    "inf": (nan_at(2, 0, 47, shape=(3, 1, 48), number=float("inf")), ValueError, ("inf", "layer 2")),
    "nan in one row": (nan_at(1, 0, 2, 0, 3, shape=(2, 1, 3, 1, 48)), ValueError, ("NaN", "layer 2")),
    "a number that is none": (float("nan"), ValueError, ("NaN",)),
    "beyond the dtype": (torch.full((48,), 1e300, dtype=torch.float64), ValueError, ("float32",)),
}


@pytest.mark.parametrize("verb", [engine.patch, engine.naive.patch], ids=["patch", "naive"])
@pytest.mark.parametrize(("values", "error", "words"), RESIDUAL.values(), ids=RESIDUAL)
def test_values(model, verb, values, error, words):
    """Of two rows, at two positions."""
    with refused(model, error, *words):
        verb(model, PROMPT, engine.Patch("resid_post", mask(2, 3), values, [-2, -1]))


SHAPES = {
    "z": (3, 6, 8), "q": (3, 6, 8), "k": (3, 2, 8), "v": (3, 2, 8), "mlp_act": (3, 80, 1), "scores": (3, 6, 10),
    "pattern": (3, 6, 10), "attn_out": (3, 1, 48), "mlp_out": (3, 1, 48),
}  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("site", SHAPES)
def test_values_of_each_site(model, site, axis):
    shape = list(SHAPES[site])
    shape[axis] += 1
    for verb in (engine.patch, engine.naive.patch):
        with refused(model, ValueError, site, str(shape[axis] - 1), str(shape[axis])):
            verb(model, PROMPT, engine.Patch(site, [(0, 0)], torch.full(shape, 0.1), mode="add"))


@pytest.mark.parametrize("site", ["z", "k", "mlp_act", "pattern"])
def test_vectors_are_of_sites_of_one_unit(model, site):
    with refused(model, ValueError, f"[{SHAPES[site][2]}]"):
        engine.patch(model, PROMPT, engine.Patch(site, [(0, 0)], torch.full((SHAPES[site][2],), 0.1)))


@verbs
@pytest.mark.parametrize("mode", ["swap", None, "Replace", 1, ""])
def test_modes(model, verb, mode):
    with refused(model, ValueError, repr(mode), "replace", "add", "scale"):
        verb(model, PROMPT, engine.Patch("q", [(0, 0)], 0.0, mode=mode))


PLACED = {
    "patch": lambda at: engine.Patch("resid_post", [1], 0.0, at, "scale"),
    "pattern": lambda at: engine.Patch("pattern", [(1, 2)], 0.5, at, "scale"),
    "knockout": lambda at: engine.Knockout(None, [0], at),
    "edit": lambda at: engine.Edit("mlp_act", [1], lambda layer, x: x, 1, at),
}
placed = pytest.mark.parametrize("made", PLACED.values(), ids=PLACED)


@placed
@pytest.mark.parametrize(("positions", "outside"), [(10, 10), (-11, -11), ([3, 10], 10), ([-1, -11, 2], -11)])
def test_positions_outside_the_prompt(model, made, positions, outside):
    for verb in (engine.patch, engine.naive.patch):
        with refused(model, IndexError, f"position {outside} ", "10 tokens"):
            verb(model, PROMPT, [*good(), made(positions)])
    if outside > 0:
        return
    with refused(model, IndexError, f"position {outside} ", "10 tokens"):
        engine.patch(model, [PROMPT * 2, PROMPT], made(positions))


@placed
@pytest.mark.parametrize("positions", [1.5, "a", [1.0], [], None, True, [0, None]], ids=repr)
def test_positions_that_are_none(model, made, positions):
    for verb in VERBS.values():
        with refused(model, TypeError, "positions must be an int or a list of ints", repr(positions)):
            verb(model, PROMPT, made(positions))


def test_a_position_twice_with_values_of_its_own(model):
    values = torch.zeros(1, 2, 3, 1, 48)
    values[0, 1] = 1
    for positions in ([-1, -1], [9, -1]):
        with refused(model, ValueError, "twice"):
            engine.patch(model, PROMPT, engine.Patch("mlp_out", [0], values, positions))


@pytest.mark.parametrize("verb", [engine.patch, engine.naive.patch])
def test_rows(model, verb):
    two, three = engine.Patch("resid_post", mask(2, 3), 0.0), engine.Patch("mlp_out", mask(3, 3), 0.0)
    alone = engine.Patch("q", [(0, 0)], 0.0)
    with refused(model, ValueError, "rows", "2", "3"):
        verb(model, PROMPT, [two, alone, three])
    with refused(model, ValueError, "rows", "3", "2"):
        verb(model, PROMPT, three, heads=MASK, values=VALUES)
    with refused(model, ValueError, "rows", "3", "2"):
        verb(model, PROMPT, [three, engine.Knockout(None, [[0], [1]])])
    with refused(model, ValueError, "rows", "3", "4"):
        verb(model, PROMPT, [three, engine.Edit("z", [0], lambda layer, z: z, rows=4)])
    with refused(model, ValueError, "2", "3"):
        verb(model, PROMPT, engine.Knockout(MASK, [[0], [1], [2]]))


@pytest.mark.parametrize("patches", ["z", 5, MASK, [None], [("z", [(0, 0)], 0.0)], {"z": 0.0}], ids=repr)
def test_patches(model, patches):
    for verb in VERBS.values():
        with refused(model, TypeError, "Patch", "Knockout", "Edit"):
            verb(model, PROMPT, patches)


def test_what_belongs_to_heads(model):
    """Positions, mode and values of the call are of `heads`: without them they would do nothing."""
    asked = engine.Patch("resid_post", [0], 0.0)
    for options in (dict(positions=[-2]), dict(mode="add"), dict(values=VALUES)):
        for verb in (engine.patch, engine.naive.patch):
            with refused(model, ValueError):
                verb(model, PROMPT, asked, **options)


@pytest.mark.parametrize("verb", [engine.patch, engine.naive.patch, engine.generate])
def test_steering_is_a_patch_now(model, verb):
    with refused(model, TypeError, "steering"):
        verb(model, PROMPT, steering=(torch.zeros(48), 1))
    assert not hasattr(engine, "Steering")


# Attention.


KEYS = {
    "outside": ([10], -1, IndexError, ("10", "10 tokens")),
    "outside, negative": ([0, -11], -1, IndexError, ("-11", "10 tokens")),
    "outside, of one row": ([[0], [10]], -1, IndexError, ("10", "10 tokens")),
    "later": ([5], 4, ValueError, ("5", "4")),
    "later, of one position": ([5], [-1, 3], ValueError, ("5", "3")),
    "later, of one row": ([[0], [9]], 8, ValueError, ("9", "8")),
    "the only one": ([0], 0, ValueError, ("0",)),
    "all": (list(range(10)), -1, ValueError, ("10",)),
    "all of one position": ([0, 1, 2], [2, 5], ValueError, ("2",)),
    "all of one row": ([[0], [0, 1, -8]], [2], ValueError, ("2",)),
    "all, twice said": ([0, 1, 2, -10, -9, -8], 2, ValueError, ("2",)),
    "none": ([], -1, (TypeError, ValueError), ("keys",)),
    "none of a row": ([[0], []], -1, (TypeError, ValueError), ("keys",)),
    "a number": (3, -1, TypeError, ("keys", "3")),
    "text": ("ab", -1, TypeError, ("keys", "ab")),
    "a fraction": ([0.5], -1, TypeError, ("keys", "0.5")),
    "nothing": (None, -1, TypeError, ("keys", "None")),
    "bools": ([True], -1, TypeError, ("keys", "True")),
}


@pytest.mark.parametrize(("keys", "positions", "error", "words"), KEYS.values(), ids=KEYS)
def test_keys(model, keys, positions, error, words):
    for verb in (engine.patch, engine.naive.patch):
        with refused(model, error, *words):
            verb(model, PROMPT, engine.Knockout(None, keys, positions))
        with refused(model, error, *words):
            verb(model, PROMPT, [*good(), engine.Knockout([(0, 1)], keys, positions)])


@pytest.mark.parametrize(
    ("heads", "error", "words"),
    [
        (mask(2, 3, 5), ValueError, ("[2, 3, 5]",)),
        ([(0, 6)], IndexError, ("6", "0..5")),
        ([(3, 0)], IndexError, ("layer 3", "0..2")),
        (mask(3, 6).long(), TypeError, ("torch.int64",)),
    ],
)
def test_heads_of_a_knockout(model, heads, error, words):
    with refused(model, error, *words):
        engine.patch(model, PROMPT, engine.Knockout(heads, [0]))


def test_knockouts_that_leave_nothing_together(model):
    asked = [engine.Knockout(None, [0, 1]), engine.Knockout([(1, 2)], [2], [2, 5])]
    with refused(model, ValueError, "2"):
        engine.patch(model, PROMPT, [engine.Knockout(None, [0, 1], 2), asked[1]])
    assert engine.patch(model, PROMPT, asked).isfinite().all()


def test_keys_of_a_shorter_prompt(model):
    with refused(model, IndexError, "5", "3 tokens"):
        engine.patch(model, [PROMPT, "abc"], engine.Knockout(None, [5]))
    with refused(model, ValueError):
        engine.patch(model, [PROMPT, "abc"], engine.Knockout(None, [0, 1, 2]))


def test_nothing_left_within_a_window():
    """The last token sees seven: the others are out of its sight anyway."""
    other = models.wrap(zoo.tiny("mistral"), zoo.tiny_tokenizer(), name="mistral")
    before = engine.patch(other, PROMPT)
    assert engine.patch(other, PROMPT, engine.Knockout(None, list(range(2, 9)))).isfinite().all()
    for verb in (engine.patch, engine.naive.patch):  # seen where the window is: in the layer
        with pytest.raises(ValueError, match="leaves a token nothing to attend to"):
            verb(other, PROMPT, engine.Knockout(None, list(range(2, 10))))
    assert torch.equal(engine.patch(other, PROMPT), before)


def seen(*weights):
    """Of every head of every layer."""
    return torch.tensor(weights).expand(3, 6, len(weights)).clone()


TENTH = [0.1] * 10
PATTERNS = {
    "negative": (seen(-0.1, 0.2, *[0.1125] * 8), -1, ("pattern",)),
    "less than one": (seen(*[0.09] * 10), -1, ("pattern", "0.9")),
    "more than one": (seen(*[0.2] * 10), -1, ("pattern", "2")),
    "nearly one": (seen(*[0.1] * 9, 0.098), -1, ("pattern",)),
    "nothing": (torch.zeros(3, 6, 10), -1, ("pattern",)),
    "after the token": (seen(*TENTH), 8, ("pattern", "8")),
    "after one of two tokens": (seen(*TENTH), [-1, -2], ("pattern",)),
    "of one position": (torch.stack([seen(*TENTH), seen(*TENTH)])[None], [-1, 7], ("pattern", "7")),
    "a number": (0.5, -1, ("pattern",)),
    "one": (1.0, -1, ("pattern",)),
    "zero": (0.0, -1, ("pattern",)),
    "fewer tokens": (seen(*[1 / 9] * 9), -1, ("9", "10")),
    "more tokens": (seen(*TENTH, 0.0), -1, ("11", "10")),
}


@pytest.mark.parametrize(("values", "positions", "words"), PATTERNS.values(), ids=PATTERNS)
def test_patterns(model, values, positions, words):
    for verb in (engine.patch, engine.naive.patch):
        with refused(model, ValueError, *words):
            verb(model, PROMPT, engine.Patch("pattern", [(1, 2)], values, positions))


def test_one_bad_pattern(model):
    """Of a row, a layer or a head that is patched; others may be anything."""
    values = seen(*TENTH).repeat(2, 1, 1, 1)
    values[1, 2, 4] *= 0.5
    units = mask(2, 3, 6)
    with refused(model, ValueError, "pattern"):
        engine.patch(model, PROMPT, engine.Patch("pattern", units, values))
    units[1, 2, 4] = False
    assert engine.patch(model, PROMPT, engine.Patch("pattern", units, values)).isfinite().all()
    for mode in ("add", "scale"):
        assert engine.patch(model, PROMPT, engine.Patch("pattern", mask(2, 3, 6), values, mode=mode)).isfinite().all()
    nearly = seen(*TENTH) * 1.0005
    assert engine.patch(model, PROMPT, engine.Patch("pattern", mask(3, 6), nearly)).isfinite().all()


@pytest.mark.parametrize("site", ["pattern", "scores"])
def test_numbers_of_tokens_of_several_prompts(model, site):
    with refused(model, ValueError, "10", "3"):
        engine.patch(model, [PROMPT, "abc"], engine.Patch(site, [(0, 0)], seen(*TENTH)))


# Functions.


@pytest.mark.parametrize(
    ("layers", "function", "rows", "error", "words"),
    [
        ([3], lambda layer, x: x, 1, IndexError, ("layer 3", "0..2")),
        ([0, -1], lambda layer, x: x, 1, IndexError, ("layer -1", "0..2")),
        (["a"], lambda layer, x: x, 1, (TypeError, ValueError), ("'a'",)),
        ([0.5], lambda layer, x: x, 1, (TypeError, ValueError), ("0.5",)),
        ([0], None, 1, TypeError, ("function", "None")),
        ([0], torch.zeros(3), 1, TypeError, ("function",)),
        ([0], lambda layer, x: x, 0, ValueError, ("rows", "0")),
        ([0], lambda layer, x: x, 1.5, ValueError, ("rows", "1.5")),
    ],
)
def test_edits(model, layers, function, rows, error, words):
    for verb in (engine.patch, engine.naive.patch):
        with refused(model, error, *words):
            verb(model, PROMPT, engine.Edit("mlp_out", layers, function, rows))


@pytest.mark.parametrize("strategy", ["auto", "packed", "batch", "naive"])
@pytest.mark.parametrize(
    "function",
    [
        lambda layer, x: x[..., :-1],
        lambda layer, x: x[:, 0],
        lambda layer, x: None,
        lambda layer, x: 1.0,
        lambda layer, x: x.repeat(1, 2, 1, 1),
    ],
)
def test_what_a_function_returns(model, strategy, function):
    with pytest.raises((TypeError, ValueError), match=r"shape|tensor"):
        engine.patch(model, PROMPT, engine.Edit("mlp_out", [1], function), strategy=strategy)


def test_a_function_that_raises(model):
    def fails(layer, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engine.patch(model, PROMPT, engine.Edit("resid_mid", [1], fails))


@pytest.mark.parametrize("site", ["resid_mid", "resid_post", "q", "pattern"])
def test_layers_that_text_passes_by(site):
    """Cross-attention layers: text alone does not go through them."""
    other = models.wrap(zoo.tiny("mllama"), zoo.tiny_tokenizer(), name="mllama")
    with pytest.raises(models.UnsupportedModelError, match=f"mllama has no {site}"):
        engine.patch(other, PROMPT, engine.Patch(site, [(0, 0)], 0.0, mode="scale"))
