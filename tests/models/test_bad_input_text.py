"""Text that is not Unicode is refused in words, wherever text is taken."""

import pytest
from PIL import Image

import engine
import models
from bench.families import wrapped
from engine import Example, tasks
from tests.refusal import MASK, VALUES, refused

HALF = "ab\ud800c"
SAID = "text must be Unicode, got a lone surrogate, '\\ud800', as character 2"

VERBS = {
    "patch": lambda model: engine.patch(model, HALF, heads=MASK, values=VALUES),
    "one of several": lambda model: engine.patch(model, ["abc", HALF], heads=MASK, values=VALUES),
    "prompt": lambda model: engine.patch(model, models.Prompt(HALF), heads=MASK, values=VALUES),
    "naive": lambda model: engine.naive.patch(model, HALF, heads=MASK, values=VALUES),
    "generate": lambda model: engine.generate(model, HALF),
    "plan": lambda model: engine.plan(model, HALF),
    "prefill": lambda model: engine.prefill(model, HALF),
    "capture": lambda model: engine.capture(model, [HALF]),
    "mtv": lambda model: engine.mtv.extract(model, [Example(HALF, 5)], VALUES, progress=False),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_half_a_surrogate_pair(model, verb):
    with refused(model, ValueError, SAID):
        verb(model)


def test_in_an_answer(model):
    with refused(model, ValueError, "lone surrogate"):
        tasks.first_token(model, Example("abc", HALF))
    with refused(model, ValueError, "lone surrogate"):
        engine.sweep(model, ["abc"], VALUES, targets=[HALF], progress=False)
    with refused(model, ValueError, "lone surrogate"):
        engine.evaluate(model, "x", [Example("abc", "d"), Example("abc", HALF)])


def test_beside_an_image():
    model = wrapped("llava")
    with refused(model, ValueError, "lone surrogate"):
        engine.patch(model, models.Prompt(f"{models.IMAGE}{HALF}", (Image.new("RGB", (28, 28)),)))


def test_whole_pairs_are_text(model):
    assert len(engine.prefill(model, "ab\U0001f600c").tokens) == 4
