"""Contrasts for SmolLM2, looked at by the bare tokenizer and by what the texts say; and what the model does on them."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import models
from engine.tasks import CONTRASTS, Contrast
from models import zoo
from tests.conftest import engine, quick

COUNT = 40
PLACES = {
    "ioi": {"IO", "S1", "S2"},
    "ioi_flipped": {"S2"},
    "greater_than": {"decade", "year"},
    "agreement": {"subject"},
}
CAPITALS = {f" {country}": f" {capital}" for country, capital in engine.tasks.load("capitals").pairs}


@pytest.fixture(scope="module")
def drawn(smollm2):
    """A function of the task's name: its pairs, drawn once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = engine.tasks.contrast(name, smollm2, count=COUNT)
        return made[name]

    return make


def read(smollm2, pairs):
    """Of each pair: tokens of prompt and source as text, the two answers, and the named positions."""
    tokenizer = smollm2.tokenizer
    for n, (prompt, source, *answers) in enumerate(
        zip(pairs.prompts, pairs.source, pairs.targets, pairs.others, strict=True)
    ):
        ids = [tokenizer(text)["input_ids"] for text in (prompt, source)]
        assert "".join(map(tokenizer.decode, ids[0])) == prompt
        for answer in answers:  # one token, whatever it follows
            for text, before in zip((prompt, source), ids, strict=True):
                *same, last = tokenizer(text + answer)["input_ids"]
                assert same == before
                assert tokenizer.decode(last) == answer
        yield (
            *([tokenizer.decode(token) for token in some] for some in ids),
            *answers,
            {name: at[n] for name, at in pairs.positions.items()},
        )


@pytest.mark.parametrize("name", CONTRASTS)
def test_aligned(smollm2, drawn, name):
    """As many tokens, all the same but at the named positions; a fact's subject ends at its position."""
    pairs = drawn(name)
    assert len(pairs) == len(set(pairs.prompts)) == len(pairs.source) == COUNT
    for clean, corrupted, target, other, at in read(smollm2, pairs):
        assert len(clean) == len(corrupted)
        assert at["end"] == len(clean) - 1
        assert target != other
        differing = {n for n, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b}
        if name == "facts":
            subjects = ["".join(text[min(differing) : at["subject"] + 1]) for text in (clean, corrupted)]
            assert max(differing) <= at["subject"]
            assert all("".join(text[: at["subject"] + 1]).endswith(tuple(CAPITALS)) for text in (clean, corrupted))
            assert subjects[0] != subjects[1]
        elif name == "greater_than":
            assert at["decade"] in differing
            assert differing <= {at[place] for place in PLACES[name]}
        else:
            assert differing == {at[place] for place in PLACES[name]}


@pytest.mark.parametrize("name", ["ioi", "ioi_flipped"])
def test_ioi(smollm2, drawn, name):
    """The target is the name that is there once, wherever it stands; no name of the partner is there twice, or, where
    it is flipped, the other one is.
    """
    orders, scenes = Counter(), set()
    for clean, corrupted, target, other, at in read(smollm2, drawn(name)):
        assert [n for n, token in enumerate(clean) if token == target] == [at["IO"]]
        assert [n for n, token in enumerate(clean) if token == other] == [at["S1"], at["S2"]]
        assert at["S1+1"] == at["S1"] + 1
        orders[at["IO"] < at["S1"]] += 1
        scenes.add(tuple(token for n, token in enumerate(clean) if n not in at.values()))
        if name == "ioi":
            strangers = {corrupted[at[place]] for place in PLACES["ioi"]}
            assert len(strangers) == 3
            assert not strangers & {target, other}
            assert all(corrupted.count(stranger) == 1 for stranger in strangers)
        else:
            assert (corrupted.count(target), corrupted.count(other)) == (2, 1)
    assert min(orders[True], orders[False]) > COUNT // 5
    assert len(scenes) > COUNT // 2


def test_greater_than(smollm2, drawn):
    """The target makes any year later, the other any year earlier; both are right after the partner's."""
    for clean, corrupted, target, other, at in read(smollm2, drawn("greater_than")):
        start, corrupted_start = (re.findall(r"\d+", "".join(text))[0] for text in (clean, corrupted))
        century = re.findall(r"\d+", "".join(clean))[1]
        assert start[:2] == corrupted_start[:2] == century
        assert corrupted_start[2:] == "01"
        assert int(f"{century}{other}9") < int(start) < int(f"{century}{target}0")
        assert int(f"{century}{other}0") > int(corrupted_start)
        assert clean[at["decade"]] + clean[at["year"]] == start[2:]


def test_agreement(smollm2, drawn):
    """A plural subject has a plural verb; the noun between is of the other number, in the partner of the same."""
    plural = {" are", " were", " have"}
    seen = Counter()
    for clean, corrupted, target, other, at in read(smollm2, drawn("agreement")):
        subject, instead, attractor = clean[at["subject"]], corrupted[at["subject"]], clean[at["attractor"]]
        assert subject.endswith("s") == (target in plural) != (other in plural)
        assert attractor.endswith("s") == instead.endswith("s") == (other in plural)
        assert subject.removesuffix("s") == instead.removesuffix("s") != attractor.removesuffix("s")
        assert at["end"] == at["attractor"]
        seen[target] += 1
    assert seen.keys() == plural | {" is", " was", " has"}


def test_facts(smollm2, drawn):
    for clean, corrupted, target, other, at in read(smollm2, drawn("facts")):
        for text, capital in ((clean, target), (corrupted, other)):
            named = "".join(text[: at["subject"] + 1])
            country = max((country for country in CAPITALS if named.endswith(country)), key=len)
            assert CAPITALS[country] == capital


@pytest.mark.parametrize("name", CONTRASTS)
def test_seeds(smollm2, drawn, name):
    """The same for a seed, whatever is asked for; others for another."""
    assert engine.tasks.contrast(name, smollm2, count=COUNT, seed=0) == drawn(name)
    assert engine.tasks.contrast(name, smollm2, count=5) == drawn(name).take(range(5))
    assert engine.tasks.contrast(name, smollm2, count=5, seed=1) != drawn(name).take(range(5))


@pytest.mark.parametrize("name", CONTRASTS)
def test_same_length(smollm2, name):
    """All of one length: a sweep takes every position of it."""
    pairs = engine.tasks.contrast(name, smollm2, count=12, same_length=True)
    lengths = {len(smollm2.tokenizer(text)["input_ids"]) for text in pairs.prompts + pairs.source}
    assert len(pairs) == 12
    assert lengths == {pairs.positions["end"][0] + 1}


@pytest.mark.parametrize("name", quick(CONTRASTS, "ioi", "agreement"))
def test_smollm2_can_do_it(smollm2, drawn, name):
    """By transformers alone: the clean prompts are answered, the corrupted ones less or the other way."""
    pairs = drawn(name).take(range(8))
    want = []
    for texts in (pairs.prompts, pairs.source):
        for text, target, other in zip(texts, pairs.targets, pairs.others, strict=True):
            ids, answers = (smollm2.tokenizer(some)["input_ids"] for some in (text, [text + target, text + other]))
            with torch.no_grad():
                logits = smollm2.hf(torch.tensor([ids])).logits[0, -1]
            want.append(logits[answers[0][-1]] - logits[answers[1][-1]])
    got = pairs.differences(smollm2)
    torch.testing.assert_close(got.flatten(), torch.stack(want), atol=1e-3, rtol=0)
    clean, corrupted = got
    assert clean.mean() > 0
    assert clean.mean() > corrupted.mean()


def test_a_sweep_takes_them(smollm2):
    """Every layer's heads together at the end, from the partner: clean and reference are the differences."""
    pairs = engine.tasks.contrast("agreement", smollm2, count=1)
    given = dict(metric="logit_difference", targets=pairs.targets, others=pairs.others, progress=False)
    where = dict(site="resid_pre", positions=pairs.positions)
    effects = engine.sweep(smollm2, pairs.prompts, source=pairs.source, **where, **given)
    assert effects.patched.shape == (1, 3, 30)
    clean, corrupted = pairs.differences(smollm2)
    torch.testing.assert_close(effects.clean.float(), clean, atol=1e-3, rtol=0)
    torch.testing.assert_close(effects.reference.float(), corrupted, atol=1e-3, rtol=0)


def test_years_of_two_digits():
    """Where the end of a year is one token, so is the answer."""
    words = [f"{n:02}" for n in range(100)]
    backend = Tokenizer(WordLevel({word: n for n, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d\d| ?[A-Za-z]+| "), "isolated")
    hf = zoo.tiny("llama")
    hf.resize_token_embeddings(128)
    model = models.wrap(hf, PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), name="two digits")
    pairs = engine.tasks.contrast("greater_than", model, count=30)
    for n, (prompt, source) in enumerate(zip(pairs.prompts, pairs.source, strict=True)):
        start, corrupted = (re.findall(r"\d\d", text)[1] for text in (prompt, source))
        assert int(pairs.others[n]) == int(start) - 10
        assert int(pairs.targets[n]) == int(start) + 10
        assert corrupted == "01"
        ids = model.tokenizer(prompt)["input_ids"]
        assert model.tokenizer.decode(ids[pairs.positions["year"][n]]) == start
    assert "decade" not in pairs.positions


def test_take():
    pairs = Contrast("mine", ["a", "b", "c"], ["d", "e", "f"], ["1", "2", "3"], ["4", "5", "6"], {"end": [0, 1, 0]})
    assert pairs.take([2, 0]) == Contrast("mine", ["c", "a"], ["f", "d"], ["3", "1"], ["6", "4"], {"end": [0, 0]})
    assert len(pairs.take([])) == 0
    for mask in ([False, False, True], torch.tensor([False, False, True]), np.array([False, False, True])):
        assert pairs.take(mask) == pairs.take([2]) == pairs.take(np.array([2]))
    assert len(pairs.take([False] * 3)) == 0
    for odd in ([True, False], [0, True], torch.tensor([0.5])):
        with pytest.raises(ValueError, match="expected indices, or a mask of all 3 pairs"):
            pairs.take(odd)
    with pytest.raises(IndexError):
        pairs.take([3])
