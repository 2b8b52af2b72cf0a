"""Bad input to whole answers, refused with what was given and what was expected, before anything is run."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import engine
import models
from engine import Example
from models import zoo

MASK = torch.zeros(1, 3, 6, dtype=torch.bool)
VALUES = torch.zeros(3, 6, 8)
EXAMPLES = [Example("abc", "de"), Example("defg", "h")]


@pytest.fixture(scope="module")
def model():
    return models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="tiny-llama")


@pytest.fixture(autouse=True)
def nothing_runs(model, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a forward was run")

    monkeypatch.setattr(model.hf, "forward", refuse)


def generate(model, **options):
    return engine.generate(model, "abc", **dict(heads=MASK, values=VALUES, max_new_tokens=4) | options)


STEPS = {
    "word": (dict(patched="most"), ValueError, "patched must be 'prompt', 'all', a number"),
    "negative": (dict(patched=-1), ValueError, "from 0 on, got -1"),
    "half": (dict(patched=0.5), TypeError, "0.5"),
    "bool": (dict(patched=True), TypeError, "True"),
    "none": (dict(patched=None), TypeError, "None"),
    "beyond": (dict(patched=4), ValueError, "step 4, but an answer of 4 tokens has the steps 0..3"),
    "listed beyond": (dict(patched=[0, 9]), ValueError, "step 9"),
    "listed negative": (dict(patched=[-1]), ValueError, "steps count from the last prompt token"),
    "empty": (dict(patched=[]), TypeError, r"\[\]"),
    "one set by step": (dict(by_step=True), ValueError, r"got \[3, 6, 8\]"),
    "no values by step": (dict(by_step=True, values=None), ValueError, "values by step must be"),
    "steps without values": (
        dict(by_step=True, values=torch.zeros(2, 3, 6, 8), patched=3),
        ValueError,
        "step 3 is patched, but values are given for 2 steps: 0..1",
    ),
    "more values than steps": (dict(by_step=True, values=torch.zeros(9, 3, 6, 8), patched="all"), ValueError, "step 8"),
    "another shape": (dict(by_step=True, values=torch.zeros(2, 3, 6, 9)), ValueError, r"\[3, 6, 9\]"),
    "NaN by step": (dict(by_step=True, values=torch.full((2, 3, 6, 8), torch.nan)), ValueError, "NaN"),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps(model, name):
    options, error, said = STEPS[name]
    with pytest.raises(error, match=said):
        generate(model, **options)


CONFIGS = {
    "beams": (GenerationConfig(num_beams=3), "rows cannot be generated with num_beams=3"),
    "sequences": (GenerationConfig(do_sample=True, num_return_sequences=2), "num_return_sequences=2"),
    "guidance": (GenerationConfig(guidance_scale=2.0), "guidance_scale=2.0.*engine.start"),
    "several": (GenerationConfig(num_beams=2, length_penalty=2.0), "length_penalty=2.0, num_beams=2"),
    "scores": (GenerationConfig(output_scores=True), "output_scores=True"),
    "idle": (GenerationConfig(temperature=0.5), "temperature are of sampling: give do_sample=True"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_rows_cannot_follow(model, name):
    config, said = CONFIGS[name]
    with pytest.raises(ValueError, match=said):
        generate(model, config=config)


@pytest.mark.parametrize("config", [{"do_sample": True}, "greedy", 0.7])
def test_what_is_no_config(model, config):
    with pytest.raises(TypeError, match="config must be a transformers GenerationConfig"):
        generate(model, config=config)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(on_token="print"), TypeError, "on_token must be a function"),
        (dict(memory=0), ValueError, "memory must be a positive number of bytes, got 0"),
        (dict(memory="1 GB"), ValueError, "1 GB"),
        (dict(seed=0.5), ValueError, "seed must be an integer"),
        (dict(stop=["\n", ""]), ValueError, "stop must be text"),
        (dict(stop=[]), ValueError, "stop must be text"),
        (dict(stop=["a", 3]), ValueError, "stop must be text"),
        (dict(max_new_tokens=126), ValueError, "exceed the 128"),
    ],
)
def test_other_options(model, options, error, said):
    with pytest.raises(error, match=said):
        generate(model, **options)


ANSWERS = {
    "empty": ("", "an answer must be text after a text prompt"),
    "no tokens": ([], "an answer must be text"),
    "outside": ([3, 99], "answer token 99 lies outside the vocabulary of 97"),
    "negative": (-1, "answer token -1"),
    "halves": ([0.5], "token ids"),
    "too long": ("x" * 200, "prompt and answer have 202 tokens, tiny-llama takes at most 128"),
}


QUIET = dict(progress=False)
VERBS = {
    "sweep": lambda model, odd: engine.sweep(model, odd, VALUES, **QUIET),
    "attribute": lambda model, odd: engine.attribute(
        model, [one.prompt for one in odd], VALUES, targets=[one.answer for one in odd], **QUIET
    ),
    "mtv": lambda model, odd: engine.mtv.extract(model, odd, VALUES, loss="answer", **QUIET),
    "mtv validation": lambda model, odd: engine.mtv.extract(
        model, EXAMPLES, VALUES, loss="answer", validation=odd, **QUIET
    ),
    "fv": lambda model, odd: engine.fv.extract(model, ["abc"], odd, means=VALUES, **QUIET),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ANSWERS)
def test_answers(model, name, verb):
    answer, said = ANSWERS[name]
    with pytest.raises((ValueError, TypeError), match=said):
        VERBS[verb](model, [Example("abc", "d"), Example("abc", answer)])


@pytest.mark.parametrize("scored", ["all", "sum", None, 1])
def test_how_answers_are_scored(model, scored):
    for verb in (engine.sweep, engine.attribute):
        with pytest.raises(ValueError, match=r"scored must be one of \['answer', 'token_mean', 'first_token'\]"):
            verb(model, EXAMPLES, VALUES, scored=scored, progress=False)
    with pytest.raises(ValueError, match="loss must be one of"):
        engine.mtv.extract(model, EXAMPLES, VALUES, loss=scored, progress=False)


@pytest.mark.parametrize("threshold", [-0.1, 1, 1.5, np.nan, "0.8", None])
def test_thresholds(model, threshold):
    with pytest.raises(ValueError, match="threshold must be a probability"):
        engine.mtv.extract(model, EXAMPLES, VALUES, threshold=threshold, progress=False)


def test_metrics_of_one_token(model):
    with pytest.raises(ValueError, match=r"'rank' is of one token, the targets of prompts \[0\] have several"):
        engine.sweep(model, EXAMPLES, VALUES, metric="rank", progress=False)
    with pytest.raises(ValueError, match=r"the same for prompts \[0, 1\]"):
        engine.sweep(model, EXAMPLES, VALUES, metric="logit_difference", others=["de", "h"], progress=False)


def test_answers_of_an_encoder():
    encoder = models.wrap(zoo.tiny("bert"), zoo.tiny_tokenizer())
    with pytest.raises(ValueError, match="its answers have one token, got 2"):
        engine.sweep(encoder, [Example([5, 6, 7], [8, 9])], "zero", progress=False)


SCORES = {
    "unknown": (dict(by="bleu"), "by must be one of"),
    "several rows": (dict(heads=MASK.expand(2, -1, -1), values=VALUES), "one row of heads, got 2"),
    "annotators for exact": (dict(answers=[["a"], ["b"]]), "answers are of by='vqa'"),
    "too few annotators": (dict(by="vqa", answers=[["a"]]), "one list for each of 2 examples"),
    "nobody": (dict(by="vqa", answers=[["a"], []]), "answers are of by='vqa'"),
    "stop": (dict(stop=""), "stop must be text"),
    "beyond": (dict(patched=50), "patched"),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores(model, name):
    options, said = SCORES[name]
    with pytest.raises(ValueError, match=said):
        engine.evaluate(model, "x", EXAMPLES, **options)


def test_ids_where_text_is_compared(model):
    with pytest.raises(ValueError, match="by='exact' compares text: got the answer 5"):
        engine.evaluate(model, "x", [Example("abc", 5)])


@pytest.mark.parametrize("found", [2.0, -1, "yes", None, float("nan")])
def test_scorers_that_give_no_score(monkeypatch, model, found):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="a scorer must give a number from 0 to 1"):
        engine.evaluate(model, "x", EXAMPLES, by=lambda text, example: found, max_new_tokens=2)


def test_function_vectors(model):
    with pytest.raises(ValueError, match="has no beginning-of-text token"):
        engine.fv.extract(model, ["abc"], EXAMPLES, bos=True, means=VALUES, progress=False)
    with pytest.raises(TypeError, match="clean examples must be a list of Examples"):
        engine.fv.extract(model, ["abc"], EXAMPLES, correct_only=True, means=VALUES, progress=False)
    with pytest.raises(ValueError, match="with permuted answers: got 2 shuffled ones"):
        engine.fv.extract(model, EXAMPLES[::-1], EXAMPLES, correct_only=True, means=VALUES, progress=False)


def test_annotators_as_text(model):
    with pytest.raises(ValueError, match="one list for each of 2 examples"):
        engine.evaluate(model, "x", EXAMPLES, by="vqa", answers=["cat", "dog"])
    with pytest.raises(ValueError, match="a list of the answers of annotators, got 'cat'"):
        engine.tasks.vqa.accuracy("c", "cat")
