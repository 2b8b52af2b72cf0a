"""Kinds of bad input that every verb refuses alike, before anything runs: models that were not wrapped, things that are
no examples, numbers that the model's dtype does not have, tensors that hold no values, integers that are none.
"""

import numpy as np
import pytest
import torch

import engine
import models
from engine import Example, Patch, tasks
from engine.methods import sav
from models import zoo
from tests.refusal import MASK, VALUES, refused

PROMPTS = ["abc", "defg"]
EXAMPLES = [Example("abc", "d"), Example("defg", 5)]
VECTOR = torch.zeros(48)


def rowstep(model, heads=MASK, values=VALUES):
    return engine.RowStep(model, rows=2, context=8)("abc", heads=heads, values=values)


# By name: verb(model), with whatever else it needs.
VERBS = {
    "patch": lambda model: engine.patch(model, "abc", heads=MASK, values=VALUES),
    "plan": lambda model: engine.plan(model, "abc"),
    "prefill": lambda model: engine.prefill(model, "abc"),
    "capture": lambda model: engine.capture(model, PROMPTS),
    "means": lambda model: engine.mean_activations(model, PROMPTS, progress=False),
    "generate": lambda model: engine.generate(model, "abc"),
    "sweep": lambda model: engine.sweep(model, EXAMPLES, VALUES, progress=False),
    "attribute": lambda model: engine.attribute(model, EXAMPLES, VALUES, progress=False),
    "evaluate": lambda model: engine.evaluate(model, "zero-shot", EXAMPLES),
    "mtv": lambda model: engine.mtv.extract(model, EXAMPLES, VALUES, progress=False),
    "vtv": lambda model: engine.vtv.extract(model, EXAMPLES, iterations=1, progress=False),
    "fv": lambda model: engine.fv.extract(model, PROMPTS, EXAMPLES, progress=False),
    "compose": lambda model: engine.fv.compose(model, VALUES, [(0, 1)]),
    "hits by layer": lambda model: engine.fv.hits_by_layer(model, EXAMPLES, VECTOR),
    "sav": lambda model: sav.SparseAttentionVectors(model, 3).fit(PROMPTS, ["a", "b"]),
    "rowstep": rowstep,
    "naive": lambda model: engine.naive.patch(model, "abc", heads=MASK, values=VALUES),
    "pool": lambda model: engine.PrefixPool(model, PROMPTS),
    "groups": engine.groups.layers,
    "pairs": lambda model: engine.groups.pairs(model, [(0, 1), (1, 0)]),
    "first token": lambda model: tasks.first_token(model, EXAMPLES[0]),
    "hits": lambda model: tasks.first_token_hits(model, EXAMPLES),
    "losses": lambda model: tasks.first_token_losses(model, PROMPTS, [1, 2], heads=MASK, values=VALUES),
    "vector": lambda model: engine.TaskVector(MASK[0], VALUES, MASK[0].float()).check(model),
}
verbs = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


def test_a_model_of_an_experiment_that_was_not_wrapped(tmp_path):
    sizes = engine.experiments.Options(seeds=1, shots=1, examples=2, steps=1, queries=2)
    with pytest.raises(TypeError, match="got LlamaForCausalLM: wrap it"):
        engine.experiments.run("main", zoo.tiny("llama"), [tasks.load("antonyms")], sizes, folder=tmp_path)


@pytest.mark.parametrize("sizes", [dict(seeds=1.5), dict(steps=0), dict(shots=-1), dict(queries=True)])
def test_sizes_of_an_experiment(sizes):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be .* integer"):
        engine.experiments.Options(**sizes)


@verbs
@pytest.mark.parametrize("given", [zoo.tiny("llama"), "smollm2-135m", None], ids=["transformers", "name", "none"])
def test_a_model_that_was_not_wrapped(verb, given):
    words = rf"models\.load.*models\.wrap.*got {type(given).__name__}: wrap it, models\.wrap\(hf\)"
    with pytest.raises(TypeError, match=words):
        verb(given)


EXAMINED = {
    "mtv": lambda model, examples: engine.mtv.extract(model, examples, VALUES, progress=False),
    "validation": lambda model, examples: engine.mtv.extract(
        model, EXAMPLES, VALUES, validation=examples, progress=False
    ),
    "vtv": lambda model, examples: engine.vtv.extract(model, examples, iterations=1, progress=False),
    "vtv's validation": lambda model, examples: engine.vtv.extract(
        model, EXAMPLES, iterations=2, validation=examples, progress=False
    ),
    "fv": lambda model, examples: engine.fv.extract(model, PROMPTS, examples, progress=False),
    "hits by layer": lambda model, examples: engine.fv.hits_by_layer(model, examples, VECTOR),
    "hits": tasks.first_token_hits,
    "evaluate": lambda model, examples: engine.evaluate(model, "zero-shot", examples),
}
examined = pytest.mark.parametrize("verb", EXAMINED.values(), ids=EXAMINED)

NO_EXAMPLES = {
    "prompts": ["abc", "de"],
    "three": [("abc", "d", "e")],
    "token ids": [(5, 6)],
    "one later": [Example("abc", "d"), {"prompt": "abc", "answer": "d"}],
    "answer none": [("abc", None)],
    "answer bool": [("abc", True)],
    "answer fraction": [("abc", 5.0)],
    "one string": "abc",
    "one example": Example("abc", "d"),
    "a number": 5,
}


@examined
@pytest.mark.parametrize("examples", NO_EXAMPLES.values(), ids=NO_EXAMPLES)
def test_examples(model, verb, examples):
    with refused(model, TypeError, "list of Examples or (prompt, answer) pairs", "got "):
        verb(model, examples)


@examined
@pytest.mark.parametrize(
    ("one", "words"),
    [
        (Example("abc", ""), "answer must be text"),
        (Example("abc", 97), "97"),
        (Example([5, 6], " x"), "answer must be text"),
        (Example("abc", None), "answer must be text"),
        (Example("abc", True), "answer must be text"),
        (Example("", "a"), "empty"),
        (Example([97], 1), "[0, 97)"),
    ],
    ids=repr,
)
def test_the_last_example_before_anything_runs(model, verb, one, words):
    with refused(model, ValueError, words):
        verb(model, [*EXAMPLES, one])


def test_an_example_is_no_list_of_prompts(model):
    for verb in (engine.patch, engine.naive.patch, engine.generate):
        with refused(model, TypeError, "a prompt must be text", "Example"):
            verb(model, Example("abc", " d"))


# Finite in float32, not in half precision.
GREAT = {torch.float16: (1e5, "65504", "1e+05"), torch.bfloat16: (3.4e38, "3.3895e+38", "3.4e+38")}


@pytest.fixture(scope="module", params=GREAT, ids=str)
def half(request):
    made = models.wrap(zoo.tiny("llama").to(request.param), zoo.tiny_tokenizer(), name=f"tiny-{request.param}")
    made.site("resid_post")  # found by a forward
    return made


VALUED = {
    "patch": lambda model, values: engine.patch(model, "abc", heads=MASK, values=values),
    "add": lambda model, values: engine.patch(model, "abc", heads=MASK, values=values, mode="add"),
    "naive": lambda model, values: engine.naive.patch(model, "abc", heads=MASK, values=values),
    "generate": lambda model, values: engine.generate(model, "abc", heads=MASK, values=values),
    "rowstep": lambda model, values: rowstep(model, values=values),
    "evaluate": lambda model, values: engine.evaluate(model, "x", EXAMPLES, heads=MASK[:1], values=values),
    "hits": lambda model, values: tasks.first_token_hits(model, EXAMPLES, heads=MASK, values=values),
    "losses": lambda model, values: tasks.first_token_losses(model, PROMPTS, [1, 2], heads=MASK, values=values),
    "sweep": lambda model, values: engine.sweep(model, EXAMPLES, values, progress=False),
    "sweep by prompt": lambda model, values: engine.sweep(
        model, EXAMPLES, values if values.layout == torch.sparse_coo else values.expand(2, -1, -1, -1), progress=False
    ),
    "attribute": lambda model, values: engine.attribute(model, EXAMPLES, values, progress=False),
    "mtv": lambda model, values: engine.mtv.extract(model, EXAMPLES, values, progress=False),
    "fv": lambda model, values: engine.fv.extract(model, PROMPTS, EXAMPLES, means=values, progress=False),
    "compose": lambda model, values: engine.fv.compose(model, values, [(0, 1)]),
}
valued = pytest.mark.parametrize("verb", VALUED.values(), ids=VALUED)

STEERED = {
    "patch": lambda model, patches: engine.patch(model, "abc", patches),
    "naive": lambda model, patches: engine.naive.patch(model, "abc", patches),
    "generate": lambda model, patches: engine.generate(model, "abc", patches),
    "hits": lambda model, patches: tasks.first_token_hits(model, EXAMPLES, patches),
    "start": lambda model, patches: engine.start(model, "abc", patches),
    "plan": lambda model, patches: engine.plan(model, "abc", patches),
    "capture": lambda model, patches: engine.capture(model, PROMPTS, patches=patches),
    "rowstep": lambda model, patches: engine.RowStep(model, rows=1, context=8)("abc", patches),
}
steered = pytest.mark.parametrize("verb", STEERED.values(), ids=STEERED)


def added(vector, layers):
    """To the residual stream, after these layers."""
    return Patch("resid_post", layers, vector, mode="add")


@valued
@pytest.mark.parametrize("sign", [1, -1])
def test_values_beyond_the_dtype(half, verb, sign):
    number, most, largest = GREAT[half.dtype]
    values = VALUES.clone()
    values[1, 2, 3] = sign * number
    with refused(half, ValueError, "values must be finite in", str(half.dtype), most, largest):
        verb(half, values)


def test_the_greatest_number_is_none_too_great(half):
    values = VALUES.clone()
    values[1, 2, 3] = torch.finfo(half.dtype).max
    assert engine.patch(half, "abc", heads=MASK, values=values).shape == (2, 97)


def test_float64_values_beyond_float32(model):
    with refused(model, ValueError, "torch.float32", "1e+39"):
        engine.patch(model, "abc", heads=MASK, values=torch.full((3, 6, 8), 1e39, dtype=torch.float64))


@steered
def test_steering_beyond_the_dtype(half, verb):
    number, most, largest = GREAT[half.dtype]
    with refused(half, ValueError, "values of resid_post must be finite in", str(half.dtype), most, largest):
        verb(half, added(torch.full((48,), number), [1]))
    with refused(half, ValueError, "values of resid_post must be finite in", str(half.dtype), most, largest):
        verb(half, added(number, [1]))


NO_VALUES = {
    "sparse": (lambda x: x.to_sparse(), "torch.sparse_coo"),
    "meta": (lambda x: x.to("meta"), "meta"),
}
without_values = pytest.mark.parametrize(("without", "said"), NO_VALUES.values(), ids=NO_VALUES)


@without_values
@valued
def test_values_without_values(model, verb, without, said):
    with refused(model, TypeError, "values must be a dense tensor with values", said):
        verb(model, without(VALUES))


@without_values
def test_other_tensors_without_values(model, without, said):
    model.site("scores")  # found by a forward
    ids = torch.tensor([5, 6, 7])
    for verb in (engine.patch, engine.naive.patch, engine.generate):
        with refused(model, TypeError, "heads must be a dense tensor with values", said):
            verb(model, "abc", heads=without(MASK), values=VALUES)
        with refused(model, TypeError, "values of resid_post must be a dense tensor", said):
            verb(model, "abc", added(without(VECTOR), [1]))
        with refused(model, TypeError, "units of resid_post must be a dense tensor", said):
            verb(model, "abc", added(VECTOR, without(torch.ones(2, 3, dtype=torch.bool))))
        with refused(model, TypeError, "keys must be a dense tensor", said):
            verb(model, "abc", engine.Knockout(None, without(ids)))
        for prompt in (without(ids), [[5, 6], without(ids)]):
            with refused(model, TypeError, "token ids must be a dense tensor", said):
                verb(model, prompt)
    with refused(model, TypeError, "token ids must be a dense tensor", said):
        engine.capture(model, [without(ids)])
    with refused(model, TypeError, "dense tensor", said):
        engine.patch(model, "abc", heads=MASK, values=VALUES, positions=without(ids))
    for what in ("targets", "others"):
        given = {"targets": ids, "others": ids + 1, what: without(ids)}
        with refused(model, TypeError, f"{what} must be a dense tensor", said):
            engine.sweep(model, [[5], [6], [7]], VALUES, metric="logit_difference", **given)
    with refused(model, TypeError, "targets must be a dense tensor", said):
        tasks.first_token_losses(model, ["a", "b", "c"], without(ids), heads=MASK, values=VALUES)
    with refused(model, TypeError, "group 'all' must be a dense tensor", said):
        engine.sweep(model, EXAMPLES, VALUES, groups={"all": without(MASK[0])}, progress=False)
    with refused(model, TypeError, "activations must be a dense tensor", said):
        sav.SparseAttentionVectors(model, 3).fit(without(VALUES.expand(2, -1, -1, -1)), ["a", "b"])
    with refused(model, TypeError, "values must be a dense tensor", said):
        engine.TaskVector(MASK[0], VALUES, VALUES[..., 0]).with_values(without(VALUES))


def search(model, **options):
    return engine.mtv.extract(model, EXAMPLES, VALUES, progress=False, **options)


COUNTED = {
    "max_new_tokens": lambda model, n: engine.generate(model, "abc", max_new_tokens=n),
    "rows of a plan": lambda model, n: engine.plan(model, "abc", rows=n),
    "rows": lambda model, n: engine.RowStep(model, rows=n),
    "context": lambda model, n: engine.RowStep(model, context=n),
    "steps": lambda model, n: search(model, steps=n),
    "rollouts": lambda model, n: search(model, rollouts=n),
    "prompts_per_step": lambda model, n: search(model, prompts_per_step=n),
    "checkpoint_every": lambda model, n: search(model, checkpoint_every=n),
    "at_once": lambda model, n: search(model, at_once=n),
    "seed": lambda model, n: search(model, seed=n),
    "iterations": lambda model, n: engine.vtv.extract(model, EXAMPLES, iterations=n, progress=False),
    "rollouts of vtv": lambda model, n: engine.vtv.extract(model, EXAMPLES, iterations=1, rollouts=n, progress=False),
    "seed of vtv": lambda model, n: engine.vtv.extract(model, EXAMPLES, iterations=1, seed=n, progress=False),
    "k": lambda model, n: engine.fv.extract(model, PROMPTS, EXAMPLES, k=n, progress=False),
    "heads of sav": lambda model, n: sav.SparseAttentionVectors(model, n).fit(PROMPTS, ["a", "b"]),
    "memory": lambda model, n: engine.sweep(model, EXAMPLES, VALUES, memory=n, progress=False),
    "seed of sweep": lambda model, n: engine.sweep(model, EXAMPLES, "resample", seed=n, progress=False),
    "seed of attribute": lambda model, n: engine.attribute(model, EXAMPLES, "resample", seed=n, progress=False),
    "steps of attribute": lambda model, n: engine.attribute(model, EXAMPLES, VALUES, steps=n, progress=False),
    "shots": lambda _, n: tasks.load("antonyms").few_shot(tasks.load("antonyms").pairs, shots=n, count=1),
    "count": lambda _, n: tasks.load("antonyms").few_shot(tasks.load("antonyms").pairs, shots=1, count=n),
    "seed of split": lambda _, n: tasks.load("antonyms").split(seed=n),
    "top": lambda _, n: engine.Effects(torch.rand(9, 2, 3), clean=torch.zeros(9)).top(n),
    "resamples": lambda _, n: engine.Effects(torch.rand(9, 2, 3), clean=torch.zeros(9)).p_values(resamples=n),
    "seed of p": lambda _, n: engine.Effects(torch.rand(9, 2, 3), clean=torch.zeros(9)).p_values(seed=n),
}


@pytest.mark.parametrize("verb", COUNTED.values(), ids=COUNTED)
@pytest.mark.parametrize(
    "number", [True, np.True_, torch.tensor(True), 1.5, np.float64(2), "3", [2], torch.tensor([2])]
)
def test_integers(model, verb, number):
    with refused(model, ValueError, repr(number)):
        verb(model, number)


def test_a_seed_of_more_than_64_bits(model):
    for verb in ("seed", "seed of vtv", "seed of sweep", "seed of split"):
        with refused(model, ValueError, "seed must be an integer of 64 bits", str(2**70)):
            COUNTED[verb](model, 2**70)


@pytest.mark.parametrize("heads", [[(True, 0)], [(0, np.True_)], [(torch.tensor(True), 0)], np.ones((3, 6))], ids=repr)
def test_heads_that_are_no_integers(model, heads):
    with refused(model, TypeError, "heads must be a bool mask or a list of (layer, head)"):
        engine.patch(model, "abc", heads=heads, values=VALUES)


@pytest.mark.parametrize(
    "positions", [True, [True], np.array([0.0]), np.array([True]), torch.tensor([[0]]), torch.tensor(0.0)], ids=repr
)
def test_positions_that_are_no_integers(model, positions):
    with refused(model, TypeError, "positions must be an int or a list of ints"):
        engine.patch(model, "abc", heads=MASK, values=VALUES, positions=positions)


BAD_LAYERS = {
    "bool": (True, TypeError, ("a bool mask or a list of layers", "True")),
    "one bool": ([0, True], TypeError, ("a bool mask or a list of layers", "True in the list")),
    "fraction": (1.0, TypeError, ("a bool mask or a list of layers", "1.0")),
    "fractions": (np.array([0.0, 1.0]), TypeError, ("a bool mask or a list of layers", "torch.float64")),
    "text": ("1", TypeError, ("a bool mask or a list of layers", "'1'")),
    "text in list": ([0, "1"], TypeError, ("a bool mask or a list of layers", "'1' in the list")),
    "none": (None, TypeError, ("a bool mask or a list of layers", "None")),
    "none in list": ([0, None], TypeError, ("a bool mask or a list of layers", "None in the list")),
    "too high": ([np.int64(3), 0], IndexError, ("layer 3", "out of range", "0..2")),
    "far too high": ([99], IndexError, ("layer 99", "out of range", "0..2")),
    "negative": ([-1], IndexError, ("layer -1", "out of range", "0..2")),
}


@steered
@pytest.mark.parametrize(("layers", "error", "words"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_layers_that_are_none(model, verb, layers, error, words):
    with refused(model, error, *words):
        verb(model, added(VECTOR, layers))


def test_one_mask_a_row(model):
    two = torch.ones(2, 3, dtype=torch.bool)
    for verb in (engine.patch, engine.naive.patch, engine.generate):
        with refused(model, ValueError, "equally many rows", "2 of resid_post", "3 of z"):
            verb(model, "abc", added(VECTOR, two), heads=MASK[:1].repeat(3, 1, 1), values=VALUES)


VECTORS = {
    "longer": (torch.zeros(49), ValueError, ("values of resid_post must have shape", "48]", "got [49]")),
    "integers": (VECTOR.long(), TypeError, ("values of resid_post must be a floating-point tensor", "torch.int64")),
    "list": ([0.0] * 48, TypeError, ("values of resid_post must be a floating-point tensor", "list")),
    "nan": (torch.full((48,), torch.nan), ValueError, ("values of resid_post must be finite", "NaN")),
    "missing": (None, ValueError, ("resid_post is to be patched but no values were given", "[3, 1, 48]")),
}


@steered
@pytest.mark.parametrize(("vector", "error", "words"), VECTORS.values(), ids=VECTORS)
def test_vectors(model, verb, vector, error, words):
    with refused(model, error, *words):
        verb(model, added(vector, [0]))


@steered
@pytest.mark.parametrize("patches", [engine.fv.FunctionVector(VECTOR, []), VECTOR, 5], ids=["function", "vector", "5"])
def test_what_is_no_patch(model, verb, patches):
    said = "patches must be engine.Patch, engine.Knockout or engine.Edit, got"
    with refused(model, TypeError, said, type(patches).__name__):
        verb(model, patches)
    with refused(model, TypeError, said, type(patches).__name__):
        verb(model, [added(VECTOR, [1]), patches])


@pytest.mark.parametrize("prompt", [[5, True], [True, False], (True, 5), [5, torch.tensor(True)]], ids=repr)
def test_bools_are_no_token_ids(model, prompt):
    for verb in (lambda one: engine.patch(model, one), lambda one: engine.capture(model, [one])):
        with refused(model, ValueError, "token ids must be one-dimensional integers"):
            verb(prompt)


@pytest.mark.parametrize("array", [np.array(["abc"]), np.array([None]), np.array("abc")], ids=repr)
def test_arrays_of_other_things(model, array):
    with refused(model, TypeError, "must be numbers that torch has", str(array.dtype)):
        engine.patch(model, array)
    with refused(model, TypeError, "values must be numbers that torch has", str(array.dtype)):
        engine.patch(model, "abc", heads=MASK, values=array)


@pytest.mark.parametrize("stop", [5, b"x", ["x", 3], True, ""], ids=repr)
def test_stop(model, stop):
    with refused(model, ValueError, "stop must be text", repr(stop)):
        engine.generate(model, "abc", stop=stop)


OPTIONS = {
    "metric list": (
        lambda model: engine.sweep(model, EXAMPLES, VALUES, metric=["kl"]),
        ValueError,
        ("metric", "['kl']"),
    ),
    "metric dict": (lambda model: engine.attribute(model, EXAMPLES, VALUES, metric={}), ValueError, ("metric", "{}")),
    "preset list": (lambda model: search(model, preset=["paper"]), ValueError, ("preset", "['paper']")),
    "estimator list": (lambda model: search(model, estimator=["relaxed"]), ValueError, ("estimator", "['relaxed']")),
    "lr text": (lambda model: search(model, lr="0.1"), ValueError, ("lr > 0", "lr='0.1'")),
    "lr infinite": (lambda model: search(model, lr=float("inf")), ValueError, ("lr > 0", "lr=inf")),
    "lr of vtv": (
        lambda model: engine.vtv.extract(model, EXAMPLES, iterations=1, lr=None, progress=False),
        ValueError,
        ("lr > 0", "lr=None"),
    ),
    "on_step": (lambda model: search(model, on_step=5), TypeError, ("on_step", "5")),
    "strategy list": (lambda model: engine.generate(model, "abc", strategy=["packed"]), ValueError, ("strategy",)),
    "groups array": (
        lambda model: engine.sweep(model, EXAMPLES, VALUES, groups=np.ones((3, 6), dtype=bool), progress=False),
        ValueError,
        ("groups must be 'units', 'heads', 'layers' or masks by name",),
    ),
    "targets": (
        lambda model: tasks.first_token_losses(model, PROMPTS, [1], heads=MASK, values=VALUES),
        ValueError,
        ("each of 2 prompts", "got 1"),
    ),
    "target": (
        lambda model: tasks.first_token_losses(model, PROMPTS, [1, 97], heads=MASK, values=VALUES),
        ValueError,
        ("97", "vocabulary"),
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), OPTIONS.values(), ids=OPTIONS)
def test_options(model, call, error, words):
    with refused(model, error, *words):
        call(model)


CHECKPOINTED = {
    "mtv": lambda model, path: search(model, checkpoint=path),
    "sweep": lambda model, path: engine.sweep(model, EXAMPLES, VALUES, checkpoint=path, progress=False),
    "fv": lambda model, path: engine.fv.extract(model, PROMPTS, EXAMPLES, checkpoint=path, progress=False),
}


@pytest.mark.parametrize("verb", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_checkpoints(model, verb, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (5, True, b"x", ["x"]):
        with refused(model, TypeError, type(path).__name__):
            verb(model, path)
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        with refused(model, OSError, "file"):
            verb(model, path)
