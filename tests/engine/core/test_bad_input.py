"""Bad input is refused by the documented exception, in words that say what was given and what was expected; nothing is
run, the model is left as it was.
"""

import pytest
import torch

import engine
import models
from models import zoo
from tests.refusal import MASK, VALUES, nan_at, refused

BAD_HEADS = {
    "too few heads": (torch.ones(2, 3, 5, dtype=torch.bool), ValueError, ("[2, 3, 5]", "[rows, 3, 6]")),
    "too many layers": (torch.ones(4, 6, dtype=torch.bool), ValueError, ("[4, 6]", "[3, 6]")),
    "one dimension": (torch.ones(6, dtype=torch.bool), ValueError, ("[6]", "[3, 6]")),
    "four dimensions": (MASK[None], ValueError, ("[1, 2, 3, 6]", "[rows, 3, 6]")),
    "no rows": (MASK[:0], ValueError, ("[0, 3, 6]", "[rows, 3, 6]")),
    "int mask": (MASK.long(), TypeError, ("torch.int64", "bool")),
    "float mask": (MASK.float(), TypeError, ("torch.float32", "bool")),
    "layer too high": ([(0, 1), (3, 0)], IndexError, ("layer 3", "0..2")),
    "layer negative": ([(-1, 0)], IndexError, ("layer -1", "0..2")),
    "head too high": ([(2, 6)], IndexError, ("head 6", "0..5")),
    "head negative": ([(2, -1)], IndexError, ("head -1", "0..5")),
    "triple": ([(0, 1, 2)], TypeError, ("(0, 1, 2)", "(layer, head)")),
    "single": ([(0,)], TypeError, ("(0,)", "(layer, head)")),
    "bare pair": ((0, 1), TypeError, ("0", "(layer, head)")),
    "fraction": ([(0.5, 1)], TypeError, ("(0.5, 1)", "(layer, head)")),
    "text": (["ab"], TypeError, ("'ab'", "(layer, head)")),
    "none in list": ([None], TypeError, ("None", "(layer, head)")),
    "a number": (5, TypeError, ("5", "(layer, head)")),
}

BAD_VALUES = {
    "missing": (None, ValueError, ("no values", "[3, 6, 8]")),
    "list": ([[1.0]], TypeError, ("list", "floating-point tensor")),
    "int": (VALUES.long(), TypeError, ("torch.int64", "floating-point tensor")),
    "wrong head_dim": (torch.zeros(3, 6, 7), ValueError, ("[3, 6, 7]", "[3, 6, 8]")),
    "one layer": (torch.zeros(6, 8), ValueError, ("[6, 8]", "[3, 6, 8]")),
    "three sets for two rows": (torch.zeros(3, 3, 6, 8), ValueError, ("[3, 3, 6, 8]", "[2, 3, 6, 8]")),
    "nan": (nan_at(1, 4, 0), ValueError, ("NaN", "layer 1", "head 4")),
    "inf": (nan_at(2, 5, 7, number=float("inf")), ValueError, ("inf", "layer 2", "head 5")),
    "nan in one row": (nan_at(1, 0, 3, 2, shape=(2, 3, 6, 8)), ValueError, ("NaN", "layer 0", "head 3")),
}

VERBS = {"patch": engine.patch, "naive": engine.naive.patch, "generate": engine.generate}
verbs = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


@verbs
@pytest.mark.parametrize(("heads", "error", "words"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_heads(model, verb, heads, error, words):
    with refused(model, error, *words):
        verb(model, "abc", heads=heads, values=VALUES)


@verbs
@pytest.mark.parametrize(("values", "error", "words"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_values(model, verb, values, error, words):
    with refused(model, error, *words):
        verb(model, "abc", heads=MASK, values=values)


@verbs
@pytest.mark.parametrize("mode", ["swap", None, "Replace"])
def test_mode(model, verb, mode):
    with refused(model, ValueError, repr(mode), "replace", "add"):
        verb(model, "abc", heads=MASK, values=VALUES, mode=mode)


PLACED = {
    "patch": lambda model, prompt, at: engine.patch(model, prompt, heads=MASK, values=VALUES, positions=at),
    "naive": lambda model, prompt, at: engine.naive.patch(model, prompt, heads=MASK, values=VALUES, positions=at),
    "plan": lambda model, prompt, at: engine.plan(model, prompt, positions=at),
    "capture": lambda model, prompt, at: engine.capture(model, [prompt], positions=at),
    "prefill": lambda model, prompt, at: engine.prefill(model, prompt, positions=at),
}
placed = pytest.mark.parametrize("verb", PLACED.values(), ids=PLACED)


@placed
@pytest.mark.parametrize(("positions", "outside"), [(10, 10), (-11, -11), ([0, 10], 10), ([-1, -11, 2], -11)])
def test_positions_outside_the_prompt(model, verb, positions, outside):
    with refused(model, IndexError, f"position {outside} ", "10 tokens"):
        verb(model, "0123456789", positions)


@placed
@pytest.mark.parametrize("positions", [1.5, "a", [1.0], [], None, True, [0, None]], ids=repr)
def test_positions_that_are_none(model, verb, positions):
    with refused(model, TypeError, "positions must be an int or a list of ints", repr(positions)):
        verb(model, "0123456789", positions)


@pytest.mark.parametrize("verb", [PLACED["patch"], PLACED["naive"]], ids=["patch", "naive"])
def test_positions_outside_one_of_several_prompts(model, verb):
    with refused(model, IndexError, "position 5 ", "3 tokens"):
        verb(model, ["0123456789", "abc"], 5)


@pytest.mark.parametrize("strategy", ["fast", None, ""])
def test_strategy(model, strategy):
    with refused(model, ValueError, repr(strategy), "packed", "expanded", "batch", "naive"):
        engine.patch(model, "abc", heads=MASK, values=VALUES, strategy=strategy)
    with refused(model, ValueError, repr(strategy), "packed"):
        engine.plan(model, "abc", strategy=strategy)
    with refused(model, ValueError, repr(strategy), "packed"):
        engine.generate(model, "abc", heads=MASK, values=VALUES, strategy=strategy)
    with refused(model, ValueError, repr(strategy), "naive"):
        engine.naive.patch(model, "abc", heads=MASK, values=VALUES, strategy=strategy)


@pytest.mark.parametrize("rows", [0, -3, 1.5])
def test_rows_of_a_plan(model, rows):
    with refused(model, ValueError, "rows", repr(rows)):
        engine.plan(model, "abc", rows=rows)


def test_packed_rows_are_refused_where_they_are_not_exact():
    hf = zoo.tiny("llama")
    hf.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    model = models.wrap(hf, zoo.tiny_tokenizer())
    with refused(model, models.UnsupportedModelError, "packed", "linear_attention"):
        engine.patch(model, "abc", heads=MASK, values=VALUES, strategy="packed")
    with refused(model, models.UnsupportedModelError, "packed", "linear_attention"):
        engine.plan(model, "abc", strategy="packed")
    with refused(model, models.UnsupportedModelError, "packed", "linear_attention"):
        engine.generate(model, "abc", heads=MASK, values=VALUES, strategy="packed")
    with refused(model, models.UnsupportedModelError, "packed", "linear_attention"):
        model.pack([models.Segment(torch.tensor([1]), torch.tensor([[2]]))])


BAD_PROMPTS = {
    "empty text": ("", ValueError, ("empty",)),
    "empty list": ([], ValueError, ("empty",)),
    "empty tensor": (torch.tensor([]), ValueError, ("empty",)),
    "empty ids": (torch.tensor([], dtype=torch.long), ValueError, ("empty",)),
    "empty prompt": (models.Prompt(""), ValueError, ("empty",)),
    "float ids": (torch.tensor([1.0, 2.0]), ValueError, ("torch.float32", "integers")),
    "float list": ([1.0, 2.0], ValueError, ("torch.float32", "integers")),
    "bool ids": (torch.tensor([True]), ValueError, ("torch.bool", "integers")),
    "two dimensions": (torch.tensor([[1, 2], [3, 4]]), ValueError, ("(2, 2)", "one-dimensional")),
    "beyond vocabulary": ([1, 97], ValueError, ("97", "[0, 97)")),
    "negative id": ([-1, 5], ValueError, ("-1", "[0, 97)")),
    "too long": ([5] * 129, ValueError, ("129 tokens", "128")),
    "too long text": ("a" * 200, ValueError, ("200 tokens", "128")),
    "image": (models.Prompt("abc", images=(object(),)), ValueError, ("1 image", "text model")),
    "nothing": (None, TypeError, ("None", "prompt")),
    "object": (object(), TypeError, ("object", "prompt")),
}

PROMPTED = {
    "patch": lambda model, prompt: engine.patch(model, prompt, heads=MASK, values=VALUES),
    "naive": lambda model, prompt: engine.naive.patch(model, prompt, heads=MASK, values=VALUES),
    "generate": lambda model, prompt: engine.generate(model, prompt, heads=MASK, values=VALUES),
    "plan": engine.plan,
    "prefill": engine.prefill,
    "capture": lambda model, prompt: engine.capture(model, [prompt]),
    "means": lambda model, prompt: engine.mean_activations(model, [prompt], progress=False),
}
prompted = pytest.mark.parametrize("verb", PROMPTED.values(), ids=PROMPTED)


@prompted
@pytest.mark.parametrize(("prompt", "error", "words"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_prompt(model, verb, prompt, error, words):
    with refused(model, error, *words):
        verb(model, prompt)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("bad", ["", [5] * 129, [97], torch.tensor([1.0])], ids=["empty", "long", "id", "float"])
def test_one_of_several_prompts(model, verb, bad):
    with refused(model, ValueError):
        verb(model, ["abc", bad], heads=MASK, values=VALUES)


@prompted
def test_text_without_a_tokenizer(verb):
    model = models.wrap(zoo.tiny("llama"))
    with refused(model, ValueError, "tokenizer"):
        verb(model, "abc")


@verbs
def test_prefix_of_another_model(model, tiny, verb):
    prefix = engine.prefill(tiny("qwen3"), "abc")
    with refused(model, ValueError, "tiny-qwen3", "tiny-llama"):
        verb(model, prefix, heads=MASK, values=VALUES)
    with refused(model, ValueError, "tiny-qwen3", "tiny-llama"):
        verb(model, ["abc", prefix], heads=MASK, values=VALUES)


@pytest.mark.parametrize("count", [0, -1, 1.5, "3", True])
def test_max_new_tokens(model, count):
    with refused(model, ValueError, "max_new_tokens", repr(count)):
        engine.generate(model, "abc", max_new_tokens=count)


def test_stop_is_text(model):
    with refused(model, ValueError, "stop", "''"):
        engine.generate(model, "abc", stop="")


def test_answer_beyond_the_context(model):
    with refused(model, ValueError, "120", "9", "128"):
        engine.generate(model, ["abc", "a" * 120], max_new_tokens=9)


def test_answer_without_a_tokenizer():
    model = models.wrap(zoo.tiny("llama"))
    with refused(model, ValueError, "tokenizer"):
        engine.generate(model, [1, 2, 3])


STREAMED = {
    "capture": engine.capture,
    "means": lambda model, prompts: engine.mean_activations(model, prompts, progress=False),
}
streamed = pytest.mark.parametrize("verb", STREAMED.values(), ids=STREAMED)


@streamed
def test_prompts_to_capture(model, verb):
    with refused(model, ValueError, "no prompts"):
        verb(model, [])
    with refused(model, TypeError, "one string"):
        verb(model, "abc")
    with refused(model, ValueError, "empty"):
        verb(model, ["abc", ""])
