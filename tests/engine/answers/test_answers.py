"""Whole answers: their losses and metrics are those of hooks on transformers' own model, teacher-forced."""

import pytest
import torch

import engine
from engine import tasks
from engine.tasks.scoring import answer_losses, with_answer
from tests.conftest import FAMILIES, KINDS, PACKED

PROMPTS = ["Q: hot\nA:", "a", "Q: big\nA: small\n\nQ: up\nA:"]
ANSWERS = ["cold", "xy", "down there"]


def log_probabilities(model, prompt, answer, at, mask, values, mode="replace"):
    """Of every token of the answer after the prompt: one hooked forward of transformers' own model over the text."""
    ids = torch.cat([model.encode(prompt), torch.tensor(answer)])
    handles = []
    for layer, projection in enumerate(model.projections):

        def hook(_, args, layer=layer):
            x = args[0].clone()
            z = x.view(*x.shape[:-1], model.shape.n_heads, -1)
            new = values[layer][mask[layer]].to(x)
            z[0, at, mask[layer]] = new + (z[0, at, mask[layer]] if mode == "add" else 0)
            return (x, *args[1:])

        handles.append(projection.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            logits = model.hf.eval()(input_ids=ids[None]).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    first = len(ids) - len(answer)
    log_p = logits[first - 1 : -1].double().log_softmax(dim=-1)
    return log_p[range(len(answer)), answer]


def tokens(model, answers=ANSWERS):
    return [model.tokenizer(answer)["input_ids"] for answer in answers]


@pytest.mark.parametrize("family", KINDS)
def test_losses_are_those_of_hooks(tiny, draw, family):
    """Answers of several lengths, several rows, summed and averaged, fresh and reused prefixes."""
    model = tiny(family)
    masks, values = draw(model, rows=3)
    ids = tokens(model)
    each = [
        [log_probabilities(model, p, a, len(model.encode(p)) - 1, mask, values) for mask in masks]
        for p, a in zip(PROMPTS, ids, strict=True)
    ]
    for prompts in (PROMPTS, [engine.prefill(model, prompt) for prompt in PROMPTS]):
        for mean in (False, True):
            got = answer_losses(model, prompts, ids, heads=masks, values=values, mean=mean)
            want = torch.tensor([[-(x.mean() if mean else x.sum()) for x in rows] for rows in each])
            # A sum of up to ten tokens, 60 nats, in float32, whose numbers are 4e-6 apart there.
            assert ((got - want).abs() / want.abs().clamp(min=10)).max() <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_every_place(tiny, draw, family):
    """By every strategy, patched earlier than the last token too, against naive; and naive against hooks."""
    model = tiny(family)
    masks, values = draw(model, rows=3)
    ids = tokens(model)[2]
    grown = with_answer(model, PROMPTS[2], ids)
    for at in (len(model.encode(PROMPTS[2])) - 1, 3):
        given = dict(heads=masks, values=values, positions=at)
        want = engine.naive.patch(model, grown, **given)
        assert want.shape == (3, len(ids), model.shape.vocab_size)
        log_p = want.double().log_softmax(dim=-1)[:, range(len(ids)), ids]
        assert (log_p[1] - log_probabilities(model, PROMPTS[2], ids, at, masks[1], values)).abs().max() <= 1e-5
        for strategy in ("auto", "expanded", "batch", *(["packed", "layered"] if family in PACKED else [])):
            got = engine.patch(model, grown, strategy=strategy, **given)
            assert (got - want).abs().max() <= 1e-5, (strategy, at)


@pytest.mark.parametrize("scored", ["answer", "token_mean", "first_token"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_sweep_scores_whole_answers(tiny, draw, family, scored):
    model = tiny(family)
    _, values = draw(model)
    mask = torch.zeros(model.shape.n_layers, model.shape.n_heads, dtype=torch.bool)
    mask[1, 2] = True
    ids, other_ids = tokens(model), tokens(model, ["warm", "z", "up"])

    def score(prompt, answer, at):
        x = log_probabilities(model, prompt, answer, at, mask, values)
        return {"answer": x.sum(), "token_mean": x.mean(), "first_token": x[0]}[scored]

    for positions in (-1, [-3, -1]):
        texts = [p for p in PROMPTS if len(p) > 3]
        which = [PROMPTS.index(p) for p in texts]
        given = dict(targets=[ANSWERS[n] for n in which], scored=scored, positions=positions, progress=False)
        others = [other_ids[n] for n in which]
        found = {
            metric: engine.sweep(model, texts, values, metric=metric, others=others, **given)
            for metric in ("log_probability", "probability", "logit_difference")
        }
        for i, n in enumerate(which):
            for p, position in enumerate([positions] if positions == -1 else positions):
                at = len(model.encode(texts[i])) + position
                want = score(texts[i], ids[n], at)
                less = want - score(texts[i], other_ids[n], at)
                got = {m: (x.patched[i] if positions == -1 else x.patched[i, p])[1, 2] for m, x in found.items()}
                assert abs(got["log_probability"] - want) <= 1e-5
                assert abs(got["probability"] - want.exp()) <= 1e-5
                assert abs(got["logit_difference"] - less) <= 1e-5 + 1e-6 * abs(less)  # sums of up to 45


def test_sources_are_scored_by_the_same_answer(tiny):
    model = tiny("llama")
    source = ["Q: odd\nA:"]
    found = engine.sweep(
        model, PROMPTS[:1], source=source, targets=ANSWERS[:1], metric="log_probability", progress=False
    )
    none = torch.zeros(model.shape.n_layers, model.shape.n_heads, dtype=torch.bool)
    want = log_probabilities(model, source[0], tokens(model)[0], 0, none, torch.zeros(*none.shape, 1)).sum()
    assert abs(found.reference[0] - want) <= 1e-5


@pytest.mark.parametrize("metric", ["log_probability", "logit_difference"])
def test_attribution_of_a_whole_answer(tiny, draw, metric):
    """The gradient, against central differences in float64."""
    model = tiny("llama")
    _, values = draw(model)
    given = dict(metric=metric, targets=ANSWERS[:1], others=["warm"], progress=False)
    found = engine.attribute(model, PROMPTS[:1], values, **given)
    z = engine.capture(model, PROMPTS[:1])[0]
    mask = torch.zeros(model.shape.n_layers, model.shape.n_heads, dtype=torch.bool)
    mask[1, 2] = True
    sides, ids = [], (tokens(model)[0], tokens(model, ["warm"])[0])
    for step in (-1e-2, 1e-2):
        shift = step * (values - z)
        at = len(model.encode(PROMPTS[0])) - 1
        one, other = (log_probabilities(model, PROMPTS[0], a, at, mask, shift, "add").sum() for a in ids)
        sides.append(one - (other if metric == "logit_difference" else 0))
    assert abs(found.effect[0, 1, 2] - (sides[1] - sides[0]) / 2e-2) <= 2e-3


def test_how_an_answer_is_split(smollm2):
    """As the text goes on; what merges with the prompt's last token is split off as text."""
    whole = smollm2.encode("Q: France\nA: Paris, Texas").tolist()
    before = smollm2.encode("Q: France\nA:").tolist()
    assert tasks.answer_tokens(smollm2, ("Q: France\nA:", " Paris, Texas")) == whole[len(before) :]
    merging = tasks.answer_tokens(smollm2, ("Q: go\nA: we", "nt"))
    assert merging == smollm2.tokenizer("nt", add_special_tokens=False)["input_ids"]
    assert tasks.answer_tokens(smollm2, engine.Example([1, 2], [3, 4])) == [3, 4]
