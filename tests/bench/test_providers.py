"""Every provider that is installed gives the oracle's answer to every case that it takes."""

import importlib.util
import sys

import pytest
import torch

import models
from bench.cases import CASES, ask
from bench.cells import some_rows
from bench.providers import PROVIDERS, Cannot, Provider
from bench.providers.provider import twin
from bench.shapes import Numbers, make
from bench.suite import TOLERANCE, apart, counted, open_provider


@pytest.fixture(scope="module")
def hf():
    return make("tiny")


@pytest.fixture(scope="module")
def ready(hf):
    """A function of the name: the provider, made once."""
    model, made = models.wrap(hf, Numbers()), {}

    def get(name):
        if name not in made:
            library = PROVIDERS[name].library
            if library and importlib.util.find_spec(library) is None:
                pytest.skip(f"{library} is not installed")
            made[name] = PROVIDERS[name](hf, model)
        return made[name]

    return get


def asked(case, model, tokens=9, rows=5):
    return ask(model.shape, tokens, case.heads(model.shape, case.rows(model.shape, rows)), model.device)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", PROVIDERS)
@torch.no_grad()
def test_agrees_with_the_oracle(ready, case, name):
    provider, oracle = ready(name), ready("naive")
    question = asked(case, provider.model)
    try:
        answer = case.prepare(provider, question)()
    except Cannot:
        return
    want = case.prepare(oracle, question)()
    assert apart(case, provider.model, question, answer, question, want) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", PROVIDERS)
@torch.no_grad()
def test_other_heads_are_another_answer(ready, name):
    """A provider that did not patch would be found out by every case but the means."""
    provider = ready(name)
    for case in CASES.values():
        if case.name == "means":
            continue
        question = asked(case, provider.model)
        unpatched = type(question)(**{**vars(question), "heads": torch.zeros_like(question.heads)})
        try:
            answer = case.prepare(provider, unpatched)()
        except Cannot:
            continue
        if case.name == "search":  # draws its own heads
            continue
        want = case.prepare(ready("naive"), question)()
        assert apart(case, provider.model, question, answer, question, want) > TOLERANCE[torch.bfloat16]


SHARED = {
    "packed": 8 + 4,
    "reordered": 8 + 4,
    "expanded": 8 + 4,
    "layered": 8 + 1 + 4,
}  # the layered one adds an unpatched row


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "rowstep"])
@torch.no_grad()
def test_tokens_that_go_through_the_linear_layers(ready, name):
    """Four rows of nine tokens, all patched from the first block on, in each of three blocks."""
    provider = ready(name)
    question = asked(CASES["rollouts"], provider.model, tokens=9, rows=4)
    question.heads[:, 0, 0] = True
    with counted(provider.counted) as tokens:
        CASES["rollouts"].prepare(provider, question)()
    assert tokens[0] == 3 * SHARED.get(name, 9 * 4)


@torch.no_grad()
def test_a_reused_prefix_is_not_computed_again(ready):
    provider, case = ready("packed"), CASES["reused"]
    call = case.prepare(provider, asked(case, provider.model, tokens=9, rows=4))
    with counted(provider.counted) as tokens:
        call()
    assert tokens[0] == 3 * 4


def test_a_library_that_rewires_modules_leaves_the_model_alone(hf):
    own = twin(hf)
    own.model.layers[0].self_attn.o_proj.forward = None
    assert "forward" not in vars(hf.model.layers[0].self_attn.o_proj)
    assert own.lm_head.weight is hf.lm_head.weight


def test_a_missing_library_is_said(hf, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, reason = open_provider("pyvene", hf, models.wrap(hf))
    assert status == "not installed"
    assert "pyvene" in reason


def test_a_broken_library_does_not_stop_the_others(hf, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "pyvene", None)  # importing it fails
    status, reason = open_provider("pyvene", hf, models.wrap(hf))
    assert status == "failed"
    assert "pyvene" in reason


@torch.no_grad()
def test_verbs_that_are_not_overridden_cannot_be_done(hf):
    provider = Provider(hf, models.wrap(hf))
    for case in CASES.values():
        with pytest.raises(Cannot):
            case.prepare(provider, asked(case, provider.model))()


def test_a_few_rows_are_spread_over_all(hf):
    case = CASES["rollouts"]
    question = asked(case, models.wrap(hf), rows=9)
    assert some_rows(question, 3).run.tolist() == [0, 4, 8]
    assert some_rows(question, 32).run.tolist() == list(range(9))
