"""Losses and hits are those of the first answer token after naive patching."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import engine
import models
from engine import Example
from engine.tasks import SHIPPED, first_token, first_token_hits, first_token_losses

ANSWERS = "abcdefghijklmnopqrs"  # 19: more prompts than are held at once
EXAMPLES = [Example(f"Q: {'x' * (i % 5)}{letter}\nA:", f" {letter}"[i % 2 :]) for i, letter in enumerate(ANSWERS)]


@pytest.mark.parametrize("name", SHIPPED)
def test_first_token_on_the_real_tokenizer(smollm2, name):
    """The token that follows the prompt when prompt and answer are tokenised together, for every shipped pair."""
    task = engine.tasks.load(name)
    for pair in task.pairs:
        example = task.example(pair)
        before = smollm2.tokenizer(example.prompt)["input_ids"]
        together = smollm2.tokenizer(example.prompt + example.answer)["input_ids"]
        assert together[: len(before)] == before
        assert first_token(smollm2, example) == together[len(before)]
        assert example.answer.startswith(smollm2.tokenizer.decode([together[len(before)]]))


def test_first_token(smollm2):
    assert smollm2.tokenizer.decode([first_token(smollm2, Example("Q: hot\nA:", " cold"))]) == " cold"
    # The prompt's last space and the answer would merge: the answer is tokenised by itself.
    assert smollm2.tokenizer.decode([first_token(smollm2, Example("Q: hot\nA: ", "cold"))]) == "cold"
    assert first_token(smollm2, Example(models.Prompt("Q: hot\nA:"), " cold")) == first_token(
        smollm2, Example("Q: hot\nA:", " cold")
    )
    assert first_token(smollm2, Example([1, 2, 3], 49151)) == 49151


@pytest.mark.parametrize("family", ["llama", "unpacked"])
def test_losses_and_hits(tiny, draw, family):
    model = tiny(family)
    heads, values = draw(model, rows=6)
    prompts = [example.prompt for example in EXAMPLES]
    logits = engine.naive.patch(model, prompts, heads=heads, values=values)  # [19, 6, 97]
    targets = [first_token(model, example) for example in EXAMPLES]
    assert targets == [model.encode(example.answer)[0] for example in EXAMPLES]

    want = cross_entropy(logits.transpose(1, 2), torch.tensor(targets)[:, None].expand(19, 6), reduction="none")
    got = first_token_losses(model, prompts, targets, heads=heads, values=values)
    assert got.shape == (19, 6)
    assert (got - want).abs().max() <= 1e-5

    # Answers that some rows give and others do not.
    likeliest = [Example(prompt, int(logits[i, i % 6].argmax())) for i, prompt in enumerate(prompts)]
    hits = first_token_hits(model, likeliest, heads=heads, values=values)
    assert torch.equal(hits, logits.argmax(-1) == torch.tensor([e.answer for e in likeliest])[:, None])
    assert 0 < hits.float().mean() < 1


def test_unpatched(model):
    """Without heads: one row, the model as it is."""
    prompts = [example.prompt for example in EXAMPLES]
    answers = [int(model.forward(model.encode(p)[None])[0].argmax()) for p in prompts]
    hits = first_token_hits(model, [Example(p, a) for p, a in zip(prompts, answers, strict=True)])
    assert hits.shape == (19, 1)
    assert hits.all()


def test_prefixes_give_the_same_losses(model, draw):
    heads, values = draw(model)
    prompts = [example.prompt for example in EXAMPLES]
    pool = engine.PrefixPool(model, prompts)
    options = dict(targets=[5] * 19, heads=heads, values=values)
    got = first_token_losses(model, [pool[i] for i in range(19)], **options)
    assert (got - first_token_losses(model, prompts, **options)).abs().max() <= 1e-5
