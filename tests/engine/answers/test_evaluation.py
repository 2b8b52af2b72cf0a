"""Scores of whole answers: text against text, by hand; batched or one by one the same."""

import numpy as np
import pytest
import torch

import engine
from engine import Example
from engine.answers.evaluation import exact, interval, normalised
from models.calls import Passing

WORDS = ["hot", "big", "up", "a", "one two"]


@pytest.fixture
def said(model):
    """What the model answers, cut at its line, and examples with these answers for some."""
    prompts = [f"Q: {word}\nA:" for word in WORDS]
    answers = [engine.generate(model, prompt, max_new_tokens=5, stop="\n") for prompt in prompts]
    return prompts, answers


def test_exact_strings(model, said):
    """Right where the whole string is, wrong where only its first token is."""
    prompts, answers = said
    wrong = {1: answers[1][:1] + "?", 3: "x" + answers[3]}
    examples = [Example(prompt, wrong.get(n, answers[n])) for n, prompt in enumerate(prompts)]
    found = engine.evaluate(model, "mine", examples, max_new_tokens=5)
    assert found.scores == tuple(float(n not in wrong) for n in range(5))
    assert (found.accuracy, found.queries, found.by) == (0.6, 5, "exact")
    assert found.low < 0.6 < found.high
    first = engine.evaluate(model, "mine", examples, by="first_token")
    assert first.scores[1] == 1.0
    assert first.scores[3] == float(answers[3][0] == "x")


def test_patched_alike(model, said, draw):
    """Heads, and the tokens of the answer that are patched, reach the answers."""
    prompts, _ = said
    heads, values = draw(model, rows=1)
    for patched in ("prompt", "all", 1):
        given = dict(heads=heads, values=values, patched=patched)
        wanted = engine.generate(model, prompts, max_new_tokens=5, stop="\n", **given)
        examples = [Example(*pair) for pair in zip(prompts, wanted, strict=True)]
        assert engine.evaluate(model, "x", examples, max_new_tokens=5, **given).accuracy == 1


def test_a_function_of_ones_own_and_annotators(model, said):
    prompts, answers = said
    examples = [Example(prompt, "zz") for prompt in prompts]
    lengths = engine.evaluate(model, "x", examples, by=lambda text, example: len(text) / 10, max_new_tokens=5)
    assert lengths.scores == tuple(len(answer) / 10 for answer in answers)
    assert lengths.low <= lengths.accuracy <= lengths.high
    for number in (np.float32(0.5), torch.tensor(0.5), np.int64(1), True):
        scored = engine.evaluate(model, "x", examples, by=lambda *_, found=number: found, max_new_tokens=5)
        assert set(scored.scores) == {float(number)}
    annotators = [[answer.strip()] * 2 + ["else"] * 8 for answer in answers]
    vqa = engine.evaluate(model, "x", examples, by="vqa", answers=annotators, max_new_tokens=5)
    assert all(score == pytest.approx(0.6) for score in vqa.scores)


def test_all_examples_are_asked_together(model, said):
    """One pass a token, not one a token and example."""
    prompts, _ = said
    examples = [Example(prompt, "zz") for prompt in prompts]
    engine.evaluate(model, "x", examples, max_new_tokens=5)
    runs = []
    handle = model.hf.register_forward_pre_hook(Passing(lambda *_: runs.append(1)))
    try:
        engine.evaluate(model, "x", examples, max_new_tokens=5)
    finally:
        handle.remove()
    assert len(runs) <= 5


@pytest.mark.parametrize(
    ("answer", "wanted", "is_exact", "is_normalised"),
    [
        (" cold", " cold", 1, 1),
        ("Cold", " cold", 0, 1),
        ("the cold.", " cold", 0, 1),
        ("Bogot\u00e1", " Bogota", 0, 1),
        ("colder", " cold", 0, 0),
        ("", " cold", 0, 0),
        ("", " A", 0, 0),  # nothing is left of an article
        ("The", " A", 0, 0),
        ("A.", " A", 0, 0),
        ("A", " A", 1, 1),
        ("+", " -", 0, 0),
        ("\U0001f44d", "\U0001f44e", 0, 0),
        ("5", " -5", 0, 0),
        ("\u22125.", " -5", 0, 1),
        ("well-known", " well known", 0, 1),
        ("\u0915\u093f", " \u0915\u093e", 0, 0),  # vowel signs
        ("\u0915\u093f.", " \u0915\u093f", 0, 1),
    ],
)
def test_how_strings_are_compared(answer, wanted, is_exact, is_normalised):
    example = Example("Q: hot\nA:", wanted)
    assert (exact(answer, example), normalised(answer, example)) == (is_exact, is_normalised)


def test_intervals():
    """Wilson's of hits, by its formula; of other scores the bootstrap's, near the normal one."""
    low, high = interval([1.0] * 3 + [0.0] * 7)
    z, p, n = 1.959964, 0.3, 10
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * (p * 0.7 / n + z * z / 400) ** 0.5
    assert (low, high) == (pytest.approx(middle - half, abs=1e-4), pytest.approx(middle + half, abs=1e-4))
    scores = torch.rand(400, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = interval(scores)
    mean, error = torch.tensor(scores).mean().item(), torch.tensor(scores).std().item() / 20
    assert (low, high) == (pytest.approx(mean - 1.96 * error, abs=0.01), pytest.approx(mean + 1.96 * error, abs=0.01))
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def test_cost_is_of_single_queries(model, said):
    prompts, _ = said
    found = engine.cost(model, [Example(prompt, "z") for prompt in prompts], queries=2)
    assert found.tokens == sum(len(model.encode(prompt)) for prompt in prompts) / 5
    assert found.seconds > 0


@pytest.mark.slow
def test_comparatives_are_answered_to_the_letter(smollm2):
    """The claim of the README on a task of its own: words other than those searched on, the whole string.

    A short search on few prompts, so that it can run here; `python -m bench answers` is the whole one.
    """
    task = engine.tasks.load("comparatives")
    train, validation, test = ([task.example(pair) for pair in part] for part in task.split(0))
    few_shot = task.few_shot(task.split(0).train, 8, 30)
    means = engine.mean_activations(smollm2, [example.prompt for example in few_shot], progress=False)
    vector = engine.mtv.extract(
        smollm2, train, means, estimator="straight_through", prompts_per_step=8, steps=25, lr=0.5,
        validation=validation, progress=False,
    )  # fmt: skip
    before = engine.evaluate(smollm2, "zero-shot", test[:20], max_new_tokens=6)
    after = engine.evaluate(smollm2, "MTV", test[:20], heads=vector.heads, values=vector.values, max_new_tokens=6)
    assert before.accuracy <= 0.1
    assert after.accuracy >= 0.6
