"""VTV is MTV of ten one-shot prompts; heads move to another task; MTV works on top of one-shot prompts."""

import pytest
import torch

import engine
from engine import tasks
from engine.methods import vtv
from engine.tasks import Pair

PAIRS = [Pair(a, b) for a, b in zip("abcdefghijkl", "mnopqrstuvwx", strict=True)]
TASK = tasks.Task("letters", tuple(PAIRS))
ONE_SHOT = TASK.few_shot(PAIRS, shots=1, count=12)


def test_it_is_its_algorithm(model):
    """The means of the first ten, then ten steps of the search."""
    vector = vtv.extract(model, ONE_SHOT, rollouts=8, seed=3, progress=False)
    means = engine.mean_activations(model, [example.prompt for example in ONE_SHOT[:10]], progress=False)
    given = dict(steps=10, rollouts=8, seed=3, validation=ONE_SHOT, progress=False)
    want = engine.mtv.extract(model, ONE_SHOT, means, **given)
    assert torch.equal(vector.values, means)
    assert torch.equal(vector.mask, want.mask)
    assert vector.metadata == want.metadata | {"method": "vtv"}
    assert len(vector.metadata["losses"]) == 10
    vector.check(model)


@pytest.mark.parametrize("iterations", [0, 13])
def test_too_few_examples(model, iterations):
    with pytest.raises(ValueError, match=f"from 1 to 12, the number of examples, got {iterations}"):
        vtv.extract(model, ONE_SHOT, iterations=iterations, progress=False)


def test_heads_of_one_task_with_the_means_of_another(model, tmp_path):
    vector = vtv.extract(model, ONE_SHOT, rollouts=8, progress=False)
    other = engine.mean_activations(model, ["Q: zz\nA: yy\n\nQ: xx\nA:"], progress=False)
    moved = vector.with_values(other)
    assert moved.heads == vector.heads
    assert moved.metadata["transferred"]
    assert "transferred" not in vector.metadata
    moved.save(tmp_path / "moved.safetensors")
    loaded = engine.TaskVector.load(tmp_path / "moved.safetensors", model)
    assert torch.equal(loaded.values, other)
    want = engine.naive.patch(model, "Q: q\nA:", heads=vector.heads, values=other)
    got = engine.patch(model, "Q: q\nA:", heads=loaded.heads, values=loaded.values)
    assert torch.allclose(got, want, atol=1e-5)
    before = engine.naive.patch(model, "Q: q\nA:", heads=vector.heads, values=vector.values)
    assert (want - before).abs().max() > 1e-3


def test_values_that_do_not_fit(model):
    vector = vtv.extract(model, ONE_SHOT, iterations=2, rollouts=4, progress=False)
    with pytest.raises(ValueError, match=r"shape \[3, 6, 8\], got \[4, 6, 8\]"):
        vector.with_values(torch.zeros(4, 6, 8))
    with pytest.raises(ValueError, match="not finite"):
        vector.with_values(torch.full((3, 6, 8), float("nan")))


def test_mtv_on_top_of_one_shot_prompts(model):
    """Examples whose prompts carry a demonstration: only the query's last token is patched, the shot stays as it is."""
    means = engine.mean_activations(model, [e.prompt for e in TASK.few_shot(PAIRS, shots=4, count=5)], progress=False)
    examples = TASK.queries(PAIRS, PAIRS, shots=1)
    assert all(example.prompt.count("Q:") == 2 for example in examples)
    vector = engine.mtv.extract(model, examples, means, steps=3, rollouts=4, validation=examples[:3], progress=False)
    prompts = [example.prompt for example in examples[:3]]
    logits = engine.naive.patch(model, prompts, heads=vector.heads, values=vector.values)
    targets = torch.tensor([tasks.first_token(model, example) for example in examples[:3]])
    loss = torch.nn.functional.cross_entropy(logits[:, 0], targets).item()
    assert vector.metadata["validation_loss"] == pytest.approx(loss, abs=1e-5)
