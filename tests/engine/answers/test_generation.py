"""Answers are, token by token, those of full hooked forwards over the growing prompt."""

import pytest
import torch

import engine
import models
from models import zoo
from models.calls import Passing
from tests.conftest import FAMILIES, KINDS, PACKED, quick
from tests.edits import after, on_z

TEXTS = ["Q: hot\nA:", "a", "Q: big\nA: small\n\nQ: up\nA:"]
ENDINGS = [(kind, "auto") for kind in KINDS] + [("llama", "expanded"), ("llama", "naive")]
COUNT = 9  # more than mistral's window of 7


def by_hand(model, prompt, mask, at_step, mode="replace", count=COUNT):
    """The tokens of one row, by hooks on transformers' own forward over the text so far; at_step: values, or None."""
    ids = model.encode(prompt)
    n_prompt = len(ids)

    def hook(layer):
        def before(_, args):
            x = args[0].clone()
            z = x.view(*x.shape[:-1], model.shape.n_heads, -1)
            for position in range(n_prompt - 1, len(ids)):
                values = at_step(position - n_prompt + 1)
                if values is not None:
                    new = values[layer][mask[layer]]
                    z[0, position, mask[layer]] = new + (z[0, position, mask[layer]] if mode == "add" else 0)
            return (x, *args[1:])

        return before

    handles = [p.register_forward_pre_hook(Passing(hook(layer))) for layer, p in enumerate(model.projections)]
    try:
        for _ in range(count):
            with torch.no_grad():
                logits = model.hf.eval()(input_ids=ids[None]).logits[0, -1]
            ids = torch.cat([ids, logits.argmax()[None]])
    finally:
        for handle in handles:
            handle.remove()
    return model.decode(ids[n_prompt:])


PATCHED = {
    "all": lambda step: True,
    "prompt": lambda step: step == 0,
    2: lambda step: step <= 2,
    (1, 3): {1, 3}.__contains__,
}


COMBINED = [
    ("all", False, "replace"),
    ("prompt", False, "replace"),
    ("all", True, "add"),
    (2, True, "replace"),
    ((1, 3), False, "add"),
]
ASKED = [
    pytest.param(kind, *one, marks=[pytest.mark.slow] * (kind in ("gpt2", "qwen3", "unpacked") and n > 1))
    for kind in KINDS
    for n, one in enumerate(COMBINED)
]


@pytest.mark.parametrize(("family", "patched", "per_row", "mode"), ASKED)
def test_agrees_with_full_forwards(tiny, draw, family, patched, per_row, mode):
    """Several prompts, several rows, shared values and values of their own, by every strategy that is exact."""
    model = tiny(family)
    heads, values = draw(model, rows=2, per_row=per_row)
    values = 3 * values  # so that rows differ in what they say
    options = dict(heads=heads, values=values, mode=mode, patched=patched, max_new_tokens=COUNT)

    def at_step(row):
        return lambda step: (values[row] if per_row else values) if PATCHED[patched](step) else None

    want = [[by_hand(model, text, heads[row], at_step(row), mode) for row in (0, 1)] for text in TEXTS]
    assert len({answer for rows in want for answer in rows}) > 1  # the patch, or the prompt, decides the answer
    for strategy in ("auto", "expanded", "batch", "naive", *(["packed"] if family in PACKED else [])):
        assert engine.generate(model, TEXTS, strategy=strategy, **options) == want, strategy


@pytest.mark.parametrize("family", KINDS)
def test_values_by_step(tiny, draw, family, random):
    """A set of values for each step, shared by all rows or a row's own; nothing is patched after them."""
    model, texts = tiny(family), TEXTS[1:]
    heads, values = draw(model, rows=2)
    steps = 3 * torch.randn(4, *values.shape, generator=random)
    for by_step in (steps, torch.stack([steps, steps.flip(0)], dim=1)):
        rows = by_step if by_step.ndim == 5 else by_step[:, None].expand(-1, 2, -1, -1, -1)

        def at_step(row, rows=rows):
            return lambda step: rows[step, row] if step < 4 else None

        want = [[by_hand(model, text, heads[row], at_step(row), count=6) for row in (0, 1)] for text in texts]
        for strategy in ("auto", "expanded", "batch", "naive"):
            given = dict(heads=heads, values=by_step, by_step=True, patched="all", max_new_tokens=6)
            assert engine.generate(model, texts, strategy=strategy, **given) == want, strategy


@pytest.mark.parametrize("family", KINDS)
def test_activations_of_generated_tokens(tiny, draw, family):
    """What heads output at every step, as patched, against a forward over prompt and answer."""
    model = tiny(family)
    heads, values = draw(model, rows=2)
    answers = engine.generate(model, TEXTS, heads=heads, values=values, patched=1, max_new_tokens=4, capture=True)
    assert [[one.text for one in rows] for rows in answers] == engine.generate(
        model, TEXTS, heads=heads, values=values, patched=1, max_new_tokens=4
    )
    for text, rows in zip(TEXTS, answers, strict=True):
        for mask, answer in zip(heads, rows, strict=True):
            ids = torch.cat([model.encode(text), answer.tokens])
            at = torch.arange(len(model.encode(text)) - 1, len(ids))
            positions = at[:2].tolist()
            prompt = ids.tolist()
            seen = []

            def look(layer, z, mask=mask, positions=positions, at=at, seen=seen):
                z[0, positions] = torch.where(mask[layer][:, None], values[layer], z[0, positions])
                seen.append(z[0, at].clone())
                return z

            model.forward(torch.tensor(prompt)[None], on_z(model, look))
            assert answer.z.shape == (len(answer.tokens) + 1, *values.shape)
            assert (answer.z - torch.stack(seen, dim=1)).abs().max() <= 1e-5


def test_steered_at_some_tokens_only(tiny, random):
    """Steering obeys `patched` as heads do: against a model steered by hand at the prompt's last token."""
    model = tiny("llama")
    vector = 4 * torch.randn(model.shape.d_model, generator=random)
    first = engine.patch(model, TEXTS[0], after(model, vector, 1))[0].argmax()
    ids = torch.cat([model.encode(TEXTS[0]), first[None]])
    second = engine.naive.patch(model, ids, after(model, vector, 1, -2))[0].argmax()
    both = engine.naive.patch(model, ids, after(model, vector, 1, [-2, -1]))[0].argmax()
    for patched, want in (("prompt", second), ("all", both)):
        got = engine.generate(model, TEXTS[0], after(model, vector, 1), patched=patched, max_new_tokens=2)
        assert got == model.decode(torch.stack([first, want]))


def test_memory_bounds_rows_not_answers(tiny, draw):
    """In parts that a budget takes, and after memory ran out."""
    model = tiny("llama")
    heads, values = draw(model, rows=5)
    given = dict(heads=heads, values=values, max_new_tokens=5)
    want = engine.generate(model, TEXTS, **given)
    for memory in (1, 40_000):
        assert engine.generate(model, TEXTS, memory=memory, **given) == want


def test_answers_are_told_as_they_come(tiny, draw):
    model = tiny("llama")
    heads, values = draw(model, rows=2)
    given = dict(heads=heads, values=values, max_new_tokens=7)
    told = {}
    stop = engine.generate(model, TEXTS, **given)[1][0][3:5]
    for strategy in ("auto", "batch"):
        told.clear()
        want = engine.generate(
            model, TEXTS, stop=[stop, "never"], strategy=strategy,
            on_token=lambda prompt, row, text: told.setdefault((prompt, row), []).append(text), **given,
        )  # fmt: skip
        assert [["".join(told.get((p, r), [])) for r in (0, 1)] for p in range(3)] == want
        assert max(map(len, told.values())) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_equals_a_full_forward(tiny, random, family):
    """Token after token, far beyond a sliding window: the logits themselves, not only the likeliest token."""
    model = tiny(family)
    if model.rules().packed:  # then every step is a full forward
        return
    ids = torch.randint(97, (30,), generator=random)
    with torch.no_grad():
        segment = models.Segment(ids[:5], ids[None, 5:6])
        for n_tokens in range(6, 30):
            out = model.pack([segment], keep=True)
            want = model.hf(input_ids=ids[None, :n_tokens]).logits[:, -1]
            assert (out.logits[0] - want).abs().max() <= 1e-5, n_tokens
            segment = models.Segment(out.contexts[0], ids[None, n_tokens : n_tokens + 1], out.rows[0])


@pytest.mark.parametrize("family", KINDS)
def test_prefixes(tiny, draw, family):
    model = tiny(family)
    heads, values = draw(model, rows=2)
    want = engine.generate(model, TEXTS, heads=heads, values=values, max_new_tokens=6)
    prefixes = [engine.prefill(model, text) for text in TEXTS]
    early = engine.prefill(model, TEXTS[2], positions=4)  # computed only in part
    before = [k.clone() for p in prefixes for k in p.cache.keys]
    for _ in range(2):
        assert engine.generate(model, prefixes, heads=heads, values=values, max_new_tokens=6) == want
    assert engine.generate(model, early, heads=heads, values=values, max_new_tokens=6) == want[2]
    assert all(torch.equal(a, b) for a, b in zip(before, (k for p in prefixes for k in p.cache.keys), strict=True))


def test_more_prompts_than_one_forward_takes(model, draw, monkeypatch):
    heads, values = draw(model, rows=3)
    want = engine.generate(model, TEXTS, heads=heads, values=values, max_new_tokens=6)
    monkeypatch.setattr("engine.answers.generation.MAX_TOKENS", 20)
    assert engine.generate(model, TEXTS, heads=heads, values=values, max_new_tokens=6) == want


@pytest.mark.parametrize(("family", "strategy"), ENDINGS)
def test_stop(tiny, draw, family, strategy):
    """An answer ends before `stop`; the other rows go on."""
    model = tiny(family)
    heads, values = draw(model, rows=4)
    options = dict(heads=heads, values=values, max_new_tokens=10)
    full = engine.generate(model, TEXTS, **options)
    stop = full[0][1][3:5]
    got = engine.generate(model, TEXTS, stop=stop, strategy=strategy, **options)
    assert got == [[answer.split(stop)[0] for answer in rows] for rows in full]
    assert len(got[0][1]) < len(full[0][1])


@pytest.mark.parametrize("strategy", ["auto", "batch", "naive"])
def test_stop_at_a_special_token(strategy):
    """As transformers' own: its text does not show it."""
    tokenizer = zoo.tiny_tokenizer()
    hf = zoo.tiny("llama")
    ids = tokenizer("Q: hot\nA:", return_tensors="pt").input_ids
    third = hf.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, ids.shape[1] + 2]
    stop = tokenizer.convert_ids_to_tokens(int(third))
    tokenizer.add_special_tokens({"additional_special_tokens": [stop]})
    model = models.wrap(hf, tokenizer, name="tiny")
    whole = hf.generate(ids, max_new_tokens=6, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)[0]
    want = tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True)
    assert engine.generate(model, "Q: hot\nA:", stop=stop, max_new_tokens=6, strategy=strategy) == want
    assert len(want) == 2
    with pytest.raises(ValueError, match="has no special tokens: give them alone as a stop"):
        engine.generate(model, "Q: hot\nA:", stop=f"{stop}\n", max_new_tokens=6, strategy=strategy)


@pytest.mark.parametrize(("family", "strategy"), ENDINGS)
def test_end_of_text(tiny, draw, family, strategy):
    """An answer ends before the model's end-of-text token; the other rows go on."""
    model = tiny(family)
    heads, values = draw(model, rows=4)
    options = dict(heads=heads, values=values, max_new_tokens=10)
    full = engine.generate(model, TEXTS, **options)
    ending = full[0][1][4]
    wrapped = models.wrap(model.hf, model.tokenizer)
    wrapped.eos, wrapped.rules = frozenset(model.encode(ending).tolist()), model.rules
    got = engine.generate(wrapped, TEXTS, strategy=strategy, **options)
    assert got == [[answer.split(ending)[0] for answer in rows] for rows in full]


def test_all_answers_ended_ends_the_work(model, draw):
    """No forward is spent on answers that are complete."""
    heads, values = draw(model, rows=3)
    wrapped = models.wrap(model.hf, model.tokenizer)
    wrapped.eos = frozenset(range(97))
    engine.generate(wrapped, max(TEXTS, key=len), max_new_tokens=1)  # a model met for the first time is checked
    runs = []
    handle = model.hf.register_forward_pre_hook(Passing(lambda *_: runs.append(1)))
    try:
        assert engine.generate(wrapped, TEXTS, heads=heads, values=values) == [[""] * 3] * 3
    finally:
        handle.remove()
    assert len(runs) == 1


def test_end_of_text_is_read_from_the_model():
    hf = zoo.tiny("llama")
    for given, read in [(None, []), (5, [5]), ([5, 7], [5, 7])]:
        hf.generation_config.eos_token_id = given
        assert models.wrap(hf).eos == frozenset(read)


def test_what_is_returned(model, draw):
    """A string; a list for several rows or several prompts; a list a prompt for both."""
    heads, values = draw(model, rows=2)
    one, many = dict(heads=heads[:1], values=values), dict(heads=heads, values=values)
    assert isinstance(engine.generate(model, TEXTS[0]), str)
    assert isinstance(engine.generate(model, model.encode(TEXTS[0]).tolist()), str)
    a, b = engine.generate(model, TEXTS[0], **many)
    assert engine.generate(model, TEXTS[0], **one) == a
    assert engine.generate(model, TEXTS[:1], **one) == [a]
    assert engine.generate(model, TEXTS[:1], **many) == [[a, b]]
    assert engine.generate(model, TEXTS[:2], **one)[0] == a
    assert engine.generate(model, TEXTS[:2], **many)[0] == [a, b]


def test_fills_the_context_to_the_last_token(model):
    """Prompt and answer may take the whole context."""
    assert len(engine.generate(model, "a" * 120, max_new_tokens=8)) == 8


@pytest.mark.parametrize("strategy", quick(["auto", "expanded"], "auto"))
def test_unpatched_real_model_answers_as_transformers(smollm2, strategy):
    prompt = "Q: hot\nA: cold\n\nQ: big\nA: small\n\nQ: up\nA:"
    ids = smollm2.encode(prompt)[None]
    with torch.no_grad():
        out = smollm2.hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    want = smollm2.decode(out[0, ids.shape[1] :])
    assert engine.generate(smollm2, prompt, max_new_tokens=12, strategy=strategy) == want


@pytest.mark.filterwarnings("ignore:.*no way can be compared")
@pytest.mark.parametrize("strategy", ["auto", "packed", "batch", "naive"])
def test_logits_that_are_nan(strategy):
    """Of a prompt, or of a row whose patch overflows: no token is made of them."""
    model = models.wrap(zoo.tiny("llama"), zoo.tiny_tokenizer(), name="broken")
    s = model.shape
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[model.encode("z")[-1]] = torch.nan
    with pytest.raises(ValueError, match=r"logits of \(prompt, row\) \[\(1, 0\)\] are NaN"):
        engine.generate(model, ["Q: hot\nA:", "Q: z\nA:"], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"logits of examples \[1\] are NaN"):
        engine.evaluate(model, "x", [("Q: hot\nA:", " x"), ("Q: z\nA:", " x")], by="first_token")
    values = torch.zeros(3, s.n_layers, s.n_heads, s.head_dim)
    values[1] = 3e38  # W_O overflows
    heads = torch.ones(3, s.n_layers, s.n_heads, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"logits of \(prompt, row\) \[\(0, 1\)\] are NaN"):
        engine.generate(model, "Q: hot\nA:", heads=heads, values=values, max_new_tokens=2, strategy=strategy)
