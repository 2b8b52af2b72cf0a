"""Sampling and penalties are those of transformers: tokens where nothing is left to chance, shares where it is."""

import collections

import pytest
import torch
from transformers import GenerationConfig

import engine
from tests.conftest import KINDS

TEXTS = ["Q: hot\nA:", "Q: big\nA: small\n\nQ: up\nA:"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        dict(repetition_penalty=5.0),
        dict(no_repeat_ngram_size=1),
        dict(repetition_penalty=1.5, do_sample=True, top_k=1),
        dict(do_sample=True, temperature=0.5, top_p=1e-6),
        # What says "off" in so many words, as configs of hubs do.
        dict(repetition_penalty=5.0, length_penalty=1.0, min_length=0, diversity_penalty=0.0, epsilon_cutoff=0.0),
    ],
)
def test_as_transformers_where_nothing_is_left_to_chance(tiny, kind, settings):
    """Unpatched, against `generate` of transformers on the same model."""
    model = tiny(kind)
    for text in TEXTS:
        ids = model.encode(text)[None]
        given = dict({"top_k": 0} | settings if "do_sample" in settings else settings)
        out = model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, pad_token_id=0, **given)
        want = model.decode(out[0, ids.shape[1] :])
        config = GenerationConfig(max_new_tokens=9, **settings)
        assert engine.generate(model, text, config=config) == want
        plain = engine.generate(model, text, max_new_tokens=9)
        assert (plain != want) or settings.get("top_p")


def test_draws_follow_the_distribution(tiny, draw):
    """The first token of many seeds, against the softmax of naive logits at a temperature."""
    model = tiny("llama")
    heads, values = draw(model, rows=1)
    config = GenerationConfig(do_sample=True, temperature=0.3, max_new_tokens=1)
    rows, given = 400, dict(values=values, config=config)
    said = [
        answer
        for seed in (0, 1)
        for answer in engine.generate(model, TEXTS[0], heads=heads.expand(rows, -1, -1), seed=seed, **given)
    ]
    p = (engine.naive.patch(model, TEXTS[0], heads=heads, values=values)[0].double() / 0.3).softmax(dim=-1)
    shares = collections.Counter(said)
    likely = p.topk(5)
    for token, probability in zip(likely.indices, likely.values, strict=True):
        # Within four standard deviations of 800 draws.
        bound = 4 * float(probability * (1 - probability) / len(said)) ** 0.5
        assert abs(shares[model.decode(token[None])] / len(said) - probability) <= bound


def test_an_answer_is_the_same_whatever_runs_beside_it(tiny, draw):
    model = tiny("llama")
    heads, values = draw(model, rows=3)
    given = dict(heads=heads, values=values, seed=4, config=GenerationConfig(do_sample=True, max_new_tokens=6))
    want = engine.generate(model, TEXTS, **given)
    assert engine.generate(model, TEXTS, **given) == want
    assert engine.generate(model, TEXTS, memory=1, **given) == want
    assert engine.generate(model, TEXTS, strategy="batch", **given) == want
    assert engine.generate(model, TEXTS[:1], **given) == want[0:1]
    assert engine.generate(model, TEXTS, **given | {"seed": 5}) != want
    assert len({answer for rows in want for answer in rows}) == 6


def test_a_config_says_where_answers_end(tiny):
    model = tiny("llama")
    full = engine.generate(model, TEXTS[0], max_new_tokens=8)
    ending = model.encode(full[4]).tolist()
    assert engine.generate(model, TEXTS[0], config=GenerationConfig(max_new_tokens=5)) == full[:5]
    ended = engine.generate(model, TEXTS[0], config=GenerationConfig(eos_token_id=ending, max_new_tokens=8))
    assert ended == full.split(full[4])[0]
    stopped = engine.generate(model, TEXTS[0], config=GenerationConfig(stop_strings=[full[2:4]], max_new_tokens=8))
    assert stopped == full.split(full[2:4])[0]
