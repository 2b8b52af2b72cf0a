"""Integers and arrays of numpy's and torch's, and plain (prompt, answer) pairs, do what Python's and `Example` do."""

import json

import numpy as np
import pytest
import torch

import engine
from engine import Example, Patch, tasks
from engine.methods import sav
from tests.edits import after

INTEGERS = [np.int64, np.uint8, torch.tensor, np.array]
integers = pytest.mark.parametrize("of", INTEGERS, ids=["int64", "uint8", "torch", "0-d array"])
SEQUENCES = {
    "list of numpy": lambda numbers: [np.int64(n) for n in numbers],
    "list of torch": lambda numbers: [torch.tensor(n) for n in numbers],
    "tuple": lambda numbers: tuple(np.int32(n) for n in numbers),
    "array": np.array,
    "reversed array": lambda numbers: np.array(numbers[::-1])[::-1],
    "tensor": torch.tensor,
}
sequences = pytest.mark.parametrize("of", SEQUENCES.values(), ids=SEQUENCES)

IDS, OTHER = [5, 6, 7, 8], [9, 10, 11]
PAIRS = [("Q: a", "b"), ("Q: cd", 5), ("Q: efg", "h")]
EXAMPLES = [Example(*pair) for pair in PAIRS]


@pytest.fixture
def given(model, draw):
    """Masks of two rows, and values."""
    return dict(zip(("heads", "values"), draw(model, rows=2), strict=True))


PATCHES = {"patch": engine.patch, "naive": engine.naive.patch}
patches = pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)


@patches
@sequences
def test_prompts(model, given, patch, of):
    want = patch(model, IDS, **given)
    assert torch.equal(patch(model, of(IDS), **given), want)
    both = patch(model, [of(IDS), of(OTHER)], **given)
    assert torch.equal(both, patch(model, [IDS, OTHER], **given))
    assert torch.equal(patch(model, (of(IDS), torch.tensor(OTHER)), **given), both)


@sequences
def test_prompts_of_other_verbs(model, of):
    assert torch.equal(engine.capture(model, [of(IDS), of(OTHER)]), engine.capture(model, [IDS, OTHER]))
    assert engine.generate(model, of(IDS)) == engine.generate(model, IDS)
    assert engine.generate(model, [of(IDS), of(OTHER)]) == engine.generate(model, [IDS, OTHER])
    assert engine.prefill(model, of(IDS)).tokens.tolist() == IDS
    assert engine.plan(model, of(IDS)) == engine.plan(model, IDS)
    swept = engine.sweep(model, [of(IDS), of(OTHER)], "zero", targets=[1, 2], progress=False)
    assert torch.equal(swept.patched, engine.sweep(model, [IDS, OTHER], "zero", targets=[1, 2], progress=False).patched)


def test_one_id_and_prompts_of_one_id(model):
    for one in ([np.int64(5)], [torch.tensor(5)], np.array([5]), torch.tensor([5])):
        assert engine.patch(model, one).shape == (1, 97)
    assert engine.patch(model, [np.array([5]), torch.tensor([6])]).shape == (2, 1, 97)


@patches
@sequences
def test_positions(model, given, patch, of):
    at = [0, 2] if of is SEQUENCES["list of numpy"] else [-1, 1]
    assert torch.equal(patch(model, IDS, positions=of(at), **given), patch(model, IDS, positions=at, **given))


@sequences
def test_positions_of_other_verbs(model, given, of):
    assert torch.equal(engine.capture(model, [IDS, OTHER], of([0, 1])), engine.capture(model, [IDS, OTHER], [0, 1]))
    assert len(engine.prefill(model, IDS, of([1, 2])).cache) == 1
    assert engine.plan(model, IDS, positions=of([1, 2])).split == 1
    swept = engine.sweep(model, [IDS], given["values"], targets=[1], positions=of([1, 2]), progress=False)
    assert swept.positions == [1, 2]
    step = engine.RowStep(model, rows=2, context=8, positions=of([-2, -1]))
    want = engine.patch(model, IDS, positions=[-2, -1], **given)
    torch.testing.assert_close(step(IDS, **given), want)


@integers
def test_one_position(model, given, of):
    want = engine.patch(model, IDS, positions=1, **given)
    assert torch.equal(engine.patch(model, IDS, positions=of(1), **given), want)
    assert torch.equal(
        engine.naive.patch(model, IDS, positions=of(1), **given), engine.naive.patch(model, IDS, positions=1, **given)
    )
    assert engine.capture(model, [IDS], of(1)).shape == (1, 3, 6, 8)
    swept = engine.sweep(model, [IDS], given["values"], targets=[1], positions=of(1), progress=False)
    assert swept.patched.shape == (1, 3, 6)


@patches
def test_masks_and_values(model, given, patch):
    want = patch(model, IDS, **given)
    heads, values = given["heads"].numpy(), given["values"].numpy()
    assert torch.equal(patch(model, IDS, heads=heads, values=values), want)
    assert torch.equal(
        patch(model, IDS, heads=heads[0], values=values.astype(np.float64)),
        patch(model, IDS, heads=given["heads"][0], values=given["values"].double()),
    )
    frozen = np.broadcast_to(values, (2, 3, 6, 8))
    assert torch.equal(
        patch(model, IDS, heads=heads, values=frozen),
        patch(model, IDS, heads=given["heads"], values=given["values"].expand(2, -1, -1, -1)),
    )


def test_values_of_other_verbs(model, given, tmp_path):
    heads, values = given["heads"], given["values"]
    array = values.numpy()
    assert engine.generate(model, IDS, heads=heads, values=array) == engine.generate(model, IDS, **given)
    assert engine.evaluate(model, "x", EXAMPLES, heads=heads[:1], values=array, by="first_token").queries == 3
    step = engine.RowStep(model, rows=2, context=8)
    assert torch.equal(step(IDS, heads=heads.numpy(), values=array), step(IDS, **given))
    for verb in (engine.sweep, engine.attribute):
        want = verb(model, EXAMPLES, values, progress=False)
        assert torch.equal(verb(model, EXAMPLES, array, progress=False).patched, want.patched)
    found = engine.mtv.extract(model, EXAMPLES, array, steps=1, rollouts=2, progress=False)
    assert torch.equal(found.values, values)
    assert torch.equal(found.with_values(array + 1).values, values + 1)
    assert torch.equal(engine.fv.compose(model, array, [(1, 2)]), engine.fv.compose(model, values, [(1, 2)]))
    z = engine.capture(model, [one.prompt for one in EXAMPLES])
    one, other = (sav.SparseAttentionVectors(model, 3).fit(x, ["a", "b", "a"]) for x in (z, z.numpy()))
    assert torch.equal(one.means_, other.means_)
    assert one.score(z.numpy(), ["a", "b", "a"]) == one.score(z, ["a", "b", "a"])


def test_pairs_of_heads(model, given):
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[1, 4] = mask[2, 0] = True
    want = engine.patch(model, IDS, heads=mask, values=given["values"])
    for heads in (
        mask.nonzero(),
        np.argwhere(mask.numpy()),
        [(np.int64(1), torch.tensor(4)), (2, 0)],
        list(mask.nonzero()),
    ):
        assert torch.equal(engine.patch(model, IDS, heads=heads, values=given["values"]), want)
    assert torch.equal(
        engine.fv.compose(model, given["values"], [(np.int64(1), torch.tensor(4))]),
        engine.fv.compose(model, given["values"], [(1, 4)]),
    )
    assert list(engine.groups.pairs(model, [(np.int64(1), 4), (torch.tensor(2), 0)])) == ["1.4 + 2.0"]
    swept = engine.sweep(model, EXAMPLES, "zero", groups={"some": mask.numpy()}, progress=False)
    assert torch.equal(swept.groups["some"], mask)


@patches
@sequences
def test_steering(model, patch, of):
    vector = torch.arange(48.0)
    want = patch(model, IDS, Patch("resid_post", [0, 2], vector, mode="add"))
    assert torch.equal(patch(model, IDS, Patch("resid_post", of([0, 2]), vector.numpy(), mode="add")), want)
    assert torch.equal(patch(model, IDS, Patch("resid_post", [np.int64(0), torch.tensor(2)], vector, mode="add")), want)
    units = torch.tensor([[True, False, True]])
    for same in (units, units.numpy(), units[..., None], units[0, :, None].numpy(), [(0, 0), (np.int64(2), 0)]):
        assert torch.equal(patch(model, IDS, [Patch("resid_post", same, vector, mode="add")]), want)
    each = after(model, vector, [0, 2, None])
    some = patch(model, IDS, each)
    assert torch.equal(patch(model, IDS, Patch("resid_post", each.units.numpy(), vector.numpy(), mode="add")), some)
    torch.testing.assert_close(some[0], patch(model, IDS, Patch("resid_post", [0], vector, mode="add"))[0])
    torch.testing.assert_close(some[2], patch(model, IDS)[0])
    function = engine.fv.FunctionVector(vector, [])
    assert torch.equal(patch(model, IDS, function.after(np.int64(1))), patch(model, IDS, function.after(1)))
    assert torch.equal(patch(model, IDS, function.after(1)), patch(model, IDS, after(model, vector, 1)))


@integers
def test_counts_and_seeds(model, given, of, tmp_path):
    assert engine.generate(model, IDS, max_new_tokens=of(3)) == engine.generate(model, IDS, max_new_tokens=3)
    assert str(engine.plan(model, IDS, rows=of(3))) == str(engine.plan(model, IDS, rows=3))
    assert engine.RowStep(model, rows=of(2), context=of(8))(IDS, **given).shape == (2, 97)
    values = given["values"]
    counts = dict(steps=2, rollouts=2, seed=3, prompts_per_step=2, checkpoint_every=1, at_once=2)
    want = engine.mtv.extract(model, EXAMPLES, values, **counts, progress=False)
    of_counts = {name: of(number) for name, number in counts.items()}
    path = tmp_path / "search"
    found = engine.mtv.extract(
        model, EXAMPLES, values, lr=np.float32(0.1), **of_counts, checkpoint=path, progress=False
    )
    assert found.metadata["seed"] == 3
    assert json.loads(json.dumps(found.metadata))["steps"] == 2
    assert torch.equal(want.mask, found.mask)
    found.save(tmp_path / "vector")
    vector = engine.vtv.extract(model, EXAMPLES, iterations=of(2), rollouts=of(2), seed=of(1), progress=False)
    assert vector.metadata["steps"] == 2
    function, _ = engine.fv.extract(model, [IDS], EXAMPLES, k=of(2), progress=False)
    function.save(tmp_path / "function")
    assert sav.SparseAttentionVectors(model, of(2)).fit(["ab", "cd"], [of(1), of(2)]).classes_.tolist() == [1, 2]
    given_seed = engine.sweep(model, EXAMPLES, "resample", seed=of(4), memory=of(100), progress=False)
    want = engine.sweep(model, EXAMPLES, "resample", seed=4, progress=False)
    torch.testing.assert_close(given_seed.patched, want.patched)
    assert given_seed.metadata["values"] == want.metadata["values"] == "resample, seed 4"
    estimated = engine.attribute(model, EXAMPLES, "zero", steps=of(2), seed=of(0), progress=False)
    assert estimated.metadata["steps"] == 2
    assert want.top(of(2)) == want.top(2)
    assert torch.equal(want.p_values(resamples=of(3), seed=of(1)), want.p_values(resamples=3, seed=1))
    low, _ = want.interval(resamples=of(99), seed=of(1))
    assert torch.equal(low, want.interval(resamples=99, seed=1)[0])


@integers
def test_draws(of):
    task = tasks.load("antonyms")
    assert task.split(of(3)) == task.split(3)
    some = task.pairs[:9]
    assert task.few_shot(some, of(2), of(3), seed=of(1)) == task.few_shot(some, 2, 3, seed=1)
    assert task.queries(some, some, of(2), seed=of(1)) == task.queries(some, some, 2, seed=1)
    questions = tuple(tasks.Question("<image> Colour:", (f"{n}.png",), f" {n}") for n in range(9))
    pictures = tasks.PictureTask("colours", questions, questions)
    assert pictures.split(of(3)) == pictures.split(3)
    assert pictures.few_shot(questions, of(2), of(3), seed=of(1)) == pictures.few_shot(questions, 2, 3, seed=1)
    assert pictures.queries(questions, questions, of(2), seed=of(1)) == pictures.queries(
        questions, questions, 2, seed=1
    )


@sequences
def test_targets(model, given, of):
    want = engine.sweep(model, [IDS, OTHER], "zero", targets=[1, 2], progress=False)
    found = engine.sweep(model, [IDS, OTHER], "zero", targets=of([1, 2]), progress=False)
    assert torch.equal(found.patched, want.patched)
    two = dict(metric="logit_difference", progress=False)
    for verb in (engine.sweep, engine.attribute):
        found = verb(model, [IDS, OTHER], "zero", targets=of([1, 2]), others=of([3, 4]), **two)
        assert torch.equal(
            found.patched, verb(model, [IDS, OTHER], "zero", targets=[1, 2], others=[3, 4], **two).patched
        )
    losses = tasks.first_token_losses(model, [IDS, OTHER], of([1, 2]), **given)
    assert torch.equal(losses, tasks.first_token_losses(model, [IDS, OTHER], [1, 2], **given))


@integers
def test_answers(model, of):
    assert tasks.first_token(model, Example("abc", of(5))) == 5
    assert tasks.first_token(model, ("abc", of(5))) == 5


LISTED = {"tuples": PAIRS, "lists": [list(pair) for pair in PAIRS], "some": [EXAMPLES[0], *PAIRS[1:]]}


@pytest.mark.parametrize("pairs", LISTED.values(), ids=LISTED)
def test_plain_pairs(model, given, pairs):
    values = given["values"]
    options = dict(steps=2, rollouts=2, progress=False)
    found, want = (engine.mtv.extract(model, some, values, validation=some, **options) for some in (pairs, EXAMPLES))
    assert torch.equal(found.probabilities, want.probabilities)
    found, want = (
        engine.vtv.extract(model, some, iterations=2, rollouts=2, validation=some, progress=False)
        for some in (pairs, EXAMPLES)
    )
    assert torch.equal(found.probabilities, want.probabilities)
    found, want = (engine.fv.extract(model, [IDS], some, k=2, progress=False) for some in (pairs, EXAMPLES))
    assert torch.equal(found[0].vector, want[0].vector)
    hits = engine.fv.hits_by_layer(model, pairs, found[0].vector.numpy())
    assert torch.equal(hits, engine.fv.hits_by_layer(model, EXAMPLES, found[0].vector))
    assert torch.equal(tasks.first_token_hits(model, pairs), tasks.first_token_hits(model, EXAMPLES))
    assert engine.evaluate(model, "x", pairs, by="first_token") == engine.evaluate(
        model, "x", EXAMPLES, by="first_token"
    )
    for verb in (engine.sweep, engine.attribute):
        assert torch.equal(
            verb(model, pairs, "zero", progress=False).patched, verb(model, EXAMPLES, "zero", progress=False).patched
        )


def test_pairs_of_token_ids_are_prompts(model):
    """To a sweep, [5, 6] is a prompt of two tokens, not one token and its answer."""
    swept = engine.sweep(model, [[5, 6], (7, 8)], "zero", targets=[1, 2], progress=False)
    want = engine.sweep(model, [torch.tensor([5, 6]), torch.tensor([7, 8])], "zero", targets=[1, 2], progress=False)
    assert torch.equal(swept.patched, want.patched)
