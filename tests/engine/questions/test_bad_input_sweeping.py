"""What does not fit a sweep, or an attribution, is refused before anything runs, in words that say what was given."""

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import models
from bench.families import wrapped
from engine import Example, attribute, groups
from models import zoo
from models.calls import Passing

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
VALUES = torch.zeros(3, 6, 8)
MASK = torch.ones(3, 6, dtype=torch.bool)


def said(error, *words):
    """`pytest.raises` with all the words in the message."""
    return pytest.raises(error, match="".join(f"(?=.*{word})" for word in words))


@pytest.fixture
def idle(model):
    """Nothing may run."""
    calls = []
    handle = model.hf.register_forward_pre_hook(Passing(lambda *_: calls.append(1)))
    yield model
    handle.remove()
    assert not calls


BOTH = [
    (dict(prompts=[]), ValueError, "list of prompts", r"got \[\]"),
    (dict(prompts="Q: hot"), ValueError, "list of prompts", "'Q: hot'"),
    (dict(prompts=Example("Q: hot", 5), targets=None), ValueError, "list of prompts", "Example"),
    (dict(prompts=[Example("Q: hot", 5), "Q: big"], targets=None), ValueError, "all Examples", "or none"),
    (dict(prompts=[Example("Q: hot", 5)], targets=[5]), ValueError, "bring their targets"),
    (dict(prompts=[[5], [], [6]]), ValueError, "empty"),
    (dict(prompts=[[5], [97], [6]]), ValueError, "97"),
    (dict(targets=None), ValueError, "'probability' needs targets", "3 prompts"),
    (dict(targets=[5, 6]), ValueError, "targets", "each of 3 prompts", r"\[5, 6\]"),
    (dict(targets="abc"), ValueError, "targets", "each of 3 prompts", "'abc'"),
    (dict(targets=[5, 6, 97]), ValueError, "97", "vocabulary of 97"),
    (dict(targets=[5, 6, 7.0]), TypeError, "targets must be text or token ids", "7.0 for prompt 2"),
    (dict(targets=[5, True, 7]), TypeError, "targets", "True for prompt 1"),
    (dict(targets=[5, "", 7]), ValueError, "answer must be text"),
    (dict(targets=[5, " a", 7]), ValueError, "text after a text prompt, or token ids"),
    (dict(metric="logit_difference"), ValueError, "'logit_difference' needs others"),
    (dict(metric="logit_difference", others=[5, 7, 8]), ValueError, r"same for prompts \[0\]"),
    (dict(metric="logit_difference", others=[1, 2]), ValueError, "others", "each of 3 prompts"),
    (dict(metric="accuracy"), ValueError, "metric must be one of", "'accuracy'"),
    (dict(metric=None), ValueError, "metric must be one of", "None"),
    (dict(values=None), ValueError, "either values or source"),
    (dict(source=PROMPTS), ValueError, "either values or source"),
    (dict(values="median"), ValueError, "values must be a tensor or one of", "'median'"),
    (dict(values=0.0), ValueError, "values must be a tensor or one of", "0.0"),
    (dict(values=VALUES[0]), ValueError, r"values must have shape \[3, 6, 8\]", r"got \[6, 8\]"),
    (dict(values=VALUES.expand(2, 3, 6, 8)), ValueError, "one set, or one for each of 3 prompts", "got 2"),
    (dict(values=VALUES.long()), TypeError, "floating-point", "torch.int64"),
    (dict(values=VALUES / 0), ValueError, "finite"),
    (dict(prompts=[[5]], targets=[5], values="resample"), ValueError, "'resample'", "two at least"),
    (dict(values=None, source=PROMPTS[:2]), ValueError, "source", "each of 3 prompts"),
    (dict(values=None, source="abc"), ValueError, "source", "'abc'"),
    (dict(values=None, source=[[5], [], [6]]), ValueError, "empty"),
    (
        dict(values=None, source=[[5, 6, 7], [8, 9, 10], [1, 2, 3, 4]], positions=[-1, 1]),
        ValueError,
        "prompt 1 has 2 tokens, its source 3",
        r"at positions \[-1, 1\]",
    ),
    (dict(values=None, source=PROMPTS[::-1], positions=-2), ValueError, "prompt 0 has 3 tokens, its source 4"),
    (dict(positions=2), IndexError, "position 2 lies outside", "2 tokens"),
    (dict(positions=[-1, -3]), IndexError, "position -3 lies outside", "2 tokens"),
    (dict(positions=[]), TypeError, "positions must be an int or a list of ints"),
    (dict(positions=0.5), TypeError, "positions must be an int or a list of ints", "0.5"),
    (dict(memory=0), ValueError, "memory must be a positive number of bytes", "0"),
    (dict(memory=0.5), ValueError, "memory must be a positive number of bytes", "0.5"),
]


@pytest.mark.parametrize("verb", [engine.sweep, attribute])
@pytest.mark.parametrize(
    "case", BOTH, ids=lambda case: " ".join(f"{key}={value!r:.30}" for key, value in case[0].items())
)
def test_both(idle, verb, case):
    given, error, *words = case
    with said(error, *words):
        verb(idle, **(dict(prompts=PROMPTS, values=VALUES, targets=[5, 6, 7], progress=False) | given))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(mode="multiply"), ValueError, ["mode must be one of", "'multiply'"]),
        (dict(mode="add", values="zero"), ValueError, ["mode 'add' takes a tensor", "'zero'"]),
        (dict(mode="add", values=None, source=PROMPTS), ValueError, ["mode 'add' takes a tensor", "a source"]),
        (dict(groups="pairs"), ValueError, ["groups must be 'units', 'heads', 'layers' or masks by name", "'pairs'"]),
        (dict(groups=[MASK]), ValueError, ["groups must be 'units', 'heads', 'layers' or masks by name"]),
        (dict(groups={}), ValueError, ["no groups"]),
        (dict(groups={"all": MASK, "few": MASK[:2]}), ValueError, ["group 'few'", r"bool mask \[3, 6\]"]),
        (dict(groups={"all": MASK.int()}), ValueError, ["group 'all'", "bool mask"]),
        (dict(groups={"all": [(0, 1)]}), ValueError, ["group 'all'", "bool mask"]),
    ],
)
def test_sweep(idle, given, error, words):
    with said(error, *words):
        engine.sweep(idle, **(dict(prompts=PROMPTS, values=VALUES, targets=[5, 6, 7], progress=False) | given))


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "2", None])
def test_steps(idle, steps):
    with said(ValueError, "steps must be a positive integer", repr(steps)):
        attribute(idle, PROMPTS, VALUES, targets=[5, 6, 7], steps=steps, progress=False)


def test_a_checkpoint_that_is_none(idle, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"something else")
    with said(ValueError, "other is truncated, or not a file with"):
        engine.sweep(idle, PROMPTS, VALUES, targets=[5, 6, 7], checkpoint=other, progress=False)
    assert other.read_bytes() == b"something else"
    engine.TaskVector(MASK, VALUES, MASK.float(), {"model": "x"}).save(other)
    with said(ValueError, "not a file with"):
        engine.sweep(idle, PROMPTS, VALUES, targets=[5, 6, 7], checkpoint=other, progress=False)


def test_text_targets_need_a_tokenizer():
    model = models.wrap(zoo.tiny("llama"))
    with said(ValueError, "without a tokenizer"):
        engine.sweep(model, ["a"], VALUES, targets=["b"], progress=False)
    with said(ValueError, "token id"):
        engine.sweep(model, [[5]], VALUES, targets=["b"], progress=False)


@pytest.mark.parametrize("verb", [engine.sweep, attribute])
def test_a_prefix_of_another_model(idle, verb, tiny):
    prefix = engine.prefill(tiny("gpt2"), [5, 6, 7])
    with said(ValueError, "tiny-gpt2", "cannot be used with"):
        verb(idle, [prefix], VALUES, targets=[5], progress=False)


@pytest.mark.parametrize("verb", [engine.sweep, attribute])
def test_an_image_token(verb):
    model = wrapped("llava")
    picture = Image.fromarray(np.zeros((28, 28, 3), dtype=np.uint8))
    prompt = models.Prompt(f"{models.IMAGE} Q: which?\nA:", (picture,))
    image = int(model.read(prompt).image_tokens.nonzero()[0])
    with said(ValueError, "is an image token"):
        verb(model, [prompt], "zero", targets=[5], positions=[image, -1], progress=False)


@pytest.mark.parametrize("head", [(3, 0), (0, 6), (-1, 0)])
def test_groups_of_heads_that_are_none(model, head):
    for make in (groups.pairs, groups.cumulative):
        with said(IndexError, "out of range"):
            make(model, [(0, 0), head])
