"""What transformers' own generate makes of a patched prompt: token by token what plain hooks make of it."""

import copy
import gc
from contextlib import contextmanager
from threading import Thread

import pytest
import torch
import transformers

import engine
import models
from bench import architectures
from bench.families import requests as asked_of
from bench.families import wrapped
from models import tiny as families
from models.calls import Passing, current
from tests.edits import after

IDS = list(range(1, 25))  # longer than every window
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
BLOCKS = {"llama": lambda hf: hf.model.layers, "gpt2": lambda hf: hf.transformer.h}
W_O = {"llama": lambda block: block.self_attn.o_proj, "gpt2": lambda block: block.attn.c_proj}
STEPS = {"prompt": {0}, "all": set(range(99)), 2: {0, 1, 2}, (0, 2): {0, 2}}


def hooks_of(model):
    """How many there are, less transformers' own, which stay wherever it has looked for outputs."""
    hooks = [h for m in model.hf.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return sum(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


@pytest.fixture(autouse=True)
def model_as_it_was(request):
    """After every test, its starts gone: no hooks, nothing on its way."""
    yield
    assert current() is None
    if "model" in request.fixturenames and hooks_of(model := request.getfixturevalue("model")):
        gc.collect()  # what holds an error holds the frames that it went through
        assert hooks_of(model) == 0


@contextmanager
def always(model, heads, values, steps=STEPS["all"], n_prompt=24):
    """Hooks on every projection, written out: rows [R * copies] of all forwards, at steps counted by tokens run."""
    dims, seen, handles = model._head_dims(model.body), [0, 0], []

    def count(_, __, given):
        seen[0] += seen[1]
        seen[1] = given["input_ids"].shape[1]

    def edit(layer):
        def before(_, args):
            z = args[0].clone().unflatten(-1, (-1, dims[layer]))
            for row in range(len(z)):
                mask = heads[row * len(heads) // len(z)][layer]
                new = values if values.ndim == 3 else values[row * len(heads) // len(z)]
                for i in range(z.shape[1]):
                    # From the end: Gemma4's last layers may skip all tokens but the last.
                    if sum(seen) - z.shape[1] + i - (n_prompt - 1) in steps:
                        z[row, i, mask] = new[layer, mask, : dims[layer]]
            return (z.flatten(2), *args[1:])

        return before

    for layer, projection in enumerate(model.body.projections):
        handles.append(projection.register_forward_pre_hook(edit(layer)))
    handles.append(model.hf.register_forward_pre_hook(count, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooked(model, heads, values, patched="all", **options):
    """Transformers' generate of the whole batch, by permanent hooks."""
    ids = torch.tensor([IDS]).repeat(len(heads), 1)
    with always(model, heads, values, STEPS[patched]):
        return model.hf.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | options)


def handed(model, start, **options):
    return model.hf.generate(**start, **GREEDY | options)


def by_hand(family, hf, ids, mask, values, steps, mode="replace", vector=None, layer=None, count=6):
    """One row: a whole forward, without a cache, for each token."""
    blocks, ids, n_prompt = BLOCKS[family](hf), list(ids), len(ids)

    def edit(at):
        def before(_, args):
            z = args[0].clone().unflatten(-1, (mask.shape[1], -1))  # [1, T, H, D]
            for step in steps:
                if n_prompt - 1 + step < z.shape[1]:
                    old = z[0, n_prompt - 1 + step, mask[at]]
                    z[0, n_prompt - 1 + step, mask[at]] = values[at, mask[at]] + (old if mode == "add" else 0)
            return (z.flatten(2),)

        return before

    def steer(_, __, out):
        h = (out[0] if isinstance(out, tuple) else out).clone()
        for step in steps:
            if n_prompt - 1 + step < h.shape[1]:
                h[0, n_prompt - 1 + step] += vector
        return (h, *out[1:]) if isinstance(out, tuple) else h

    handles = [W_O[family](block).register_forward_pre_hook(edit(at)) for at, block in enumerate(blocks)]
    if layer is not None:
        handles.append(blocks[layer].register_forward_hook(steer))
    try:
        with torch.no_grad():
            for _ in range(count):
                ids.append(int(hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    finally:
        for handle in handles:
            handle.remove()
    return ids


@pytest.mark.parametrize("patched", STEPS)
@pytest.mark.parametrize("family", BLOCKS)
def test_equals_plain_forwards(tiny, draw, random, family, patched):
    """Values of every row's own, both modes, steering after layers of every row's own."""
    model = tiny(family)
    heads, values = draw(model, rows=3, per_row=True)
    values, vector, layers = 3 * values, 5 * torch.randn(model.shape.d_model, generator=random), [0, None, 2]
    added = after(model, vector, layers)
    for mode, steered in (("replace", None), ("add", None), ("replace", added)):
        options = dict(patches=steered, heads=heads, values=values, mode=mode)
        given = list(patched) if isinstance(patched, tuple) else patched
        start = engine.start(model, IDS, patched=given, **options)
        got = handed(model, start, max_new_tokens=6).tolist()
        at = layers if steered else [None] * 3
        rows = [(heads[r], values[r], STEPS[patched], mode, vector, at[r]) for r in range(3)]
        assert got == [by_hand(family, model.hf, IDS, *row) for row in rows]


@pytest.mark.filterwarnings("ignore:.*")  # of the libraries, on families they no longer care for
@pytest.mark.parametrize("family", [*families.TEXT, *families.IMAGE_TEXT])
def test_every_family(family):
    """Text; a picture; where nothing is shared, all of it run by generate. And `engine.generate` says the same."""
    model = wrapped(family)
    asked = list(asked_of(model))[4 if family in families.TEXT else 0]
    prompt, heads, values = asked["prompt"], asked["heads"][:2], 3 * asked["values"]
    encoded = model.read(prompt)
    n_prompt, others = len(encoded.ids), list(range(97, model.shape.vocab_size)) or None  # tokens of pictures
    options = dict(max_new_tokens=4, suppress_tokens=others)
    assert n_prompt > 11
    for patched in ("prompt", "all"):
        start = engine.start(model, prompt, heads=heads, values=values, patched=patched)
        assert start["past_key_values"].get_seq_length() in (0, n_prompt - 1)
        assert set(start["input_ids"].shape) == {2, n_prompt}
        got = handed(model, start, **options)[:, n_prompt:].tolist()
        config = transformers.GenerationConfig(suppress_tokens=others, eos_token_id=[], max_new_tokens=4)
        given = dict(heads=heads, values=values, patched=patched, config=config, capture=True)
        ours = engine.generate(model, prompt, **given)
        assert [one.tokens.tolist() for one in ours] == got
        if patched == "prompt" and family != "paligemma":  # whose prompt would see the answer in a forward over both
            got = [row[:2] for row in got]
            want = [greedy(model, encoded, row, values, 2) for row in heads]
        else:
            rows = dict(attention_mask=torch.ones(2, n_prompt, dtype=torch.long))
            rows |= {name: torch.cat([value, value]) for name, value in encoded.inputs.items()}
            with always(model, heads, values, STEPS[patched], n_prompt):
                out = model.hf.generate(encoded.ids.repeat(2, 1), **rows, **GREEDY | options)
            want = out[:, n_prompt:].tolist()
        assert got == want, patched
        del start
        assert hooks_of(model) == 0


def greedy(model, encoded, mask, values, count):
    """By naive forwards over the growing prompt, its last token patched."""
    at, prefix = len(encoded.ids) - 1, engine.Prefix(encoded, models.KeyValues(), model)
    for _ in range(count):
        logits = engine.naive.patch(model, prefix, heads=mask, values=values, positions=at)
        prefix = engine.Prefix(prefix.prompt.then(logits[0, :97].argmax()[None]), models.KeyValues(), model)
    return prefix.tokens[at + 1 :].tolist()


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "llava"])
def test_other_backends(family, backend):
    """By the generate of the model that they wrap."""
    plain, model = wrapped(family), wrapped(family, torch.float32, backend)
    asked = next(asked_of(plain))
    options = dict(heads=asked["heads"], values=3 * asked["values"], patched="all")
    for steered in (None, after(plain, torch.ones(plain.shape.d_model), [0, None, 2, 1])):
        want, got = (
            handed(one, engine.start(one, asked["prompt"], steered, **options), max_new_tokens=6)
            for one in (plain, model)
        )
        assert torch.equal(got, want)
        assert len({tuple(row) for row in got.tolist()}) > 1


@pytest.mark.parametrize("patched", ["all", "prompt"])
@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=3),
        dict(num_beams=4, num_return_sequences=2, length_penalty=0.5),
        dict(do_sample=True, top_p=0.9, temperature=1.5),
        dict(do_sample=True, num_return_sequences=3, top_k=20),
        dict(do_sample=True, num_beams=2),
        dict(prefix_allowed_tokens_fn=lambda _, ids: list(range(20, 40)) if len(ids) % 2 else [41, 43]),
        dict(repetition_penalty=1.5, no_repeat_ngram_size=2),
        dict(max_new_tokens=7, eos_token_id=list(range(0, 97, 3))),
    ],
    ids=lambda options: "+".join(options),
)
def test_ways_of_choosing(model, draw, options, patched):
    """Beams that change places, samples of one seed, constraints: as with hooks that stay."""
    heads, values = draw(model, rows=3)
    copies = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    options = dict(max_new_tokens=8) | options
    start = engine.start(model, IDS, heads=heads, values=3 * values, patched=patched, copies=copies)
    torch.manual_seed(1)
    got = handed(model, start, **options)
    torch.manual_seed(1)
    assert torch.equal(got, hooked(model, heads, 3 * values, patched, **options))


@pytest.mark.parametrize(("family", "patched"), [("llama", "all"), ("mistral", 3), ("gemma4_text", "all")])
@pytest.mark.filterwarnings("ignore:.*")
def test_guesses_that_are_taken_back(tiny, draw, family, patched):
    """Several tokens a forward, some of them cut off the cache again; Gemma4's last layers skip all but the last."""
    model = models.wrap(architectures.build(family)) if family == "gemma4_text" else tiny(family)
    heads, values = draw(model, rows=1)
    ids = [5, 6, 7, 8, 9] * 5
    options = dict(heads=heads, values=3 * values, patched=patched)
    want = handed(model, engine.start(model, ids, **options), max_new_tokens=20)
    sizes = []
    handle = model.hf.register_forward_pre_hook(
        Passing(lambda _, __, given: sizes.append(given["input_ids"].shape[1])), with_kwargs=True
    )
    start = engine.start(model, ids, **options)
    got = handed(model, start, max_new_tokens=20, prompt_lookup_num_tokens=3)
    handle.remove()
    assert torch.equal(got, want)
    assert max(sizes[1:]) > 1


def test_prompts_in_chunks(model, draw):
    heads, values = draw(model, rows=2)
    whole = models.wrap(model.hf, model.tokenizer)
    whole._ruled_of = lambda body: model._ruled_of(body).without("expanded", "the tests say so")
    start = engine.start(whole, IDS, heads=heads, values=3 * values, patched=1)
    assert start["past_key_values"].get_seq_length() == 0
    got = handed(whole, start, max_new_tokens=5, prefill_chunk_size=5)
    want = handed(model, engine.start(model, IDS, heads=heads, values=3 * values, patched=1), max_new_tokens=5)
    assert torch.equal(got, want)


def test_streamed_by_another_thread(model, draw):
    heads, values = draw(model, rows=1)
    start = engine.start(model, "Q: hot\nA:", heads=heads, values=3 * values, patched="all")
    streamer = transformers.TextIteratorStreamer(model.tokenizer, skip_prompt=True)
    thread = Thread(target=lambda: handed(model, start, max_new_tokens=12, streamer=streamer))
    thread.start()
    plain = torch.tensor([IDS])
    with torch.no_grad():
        forwards = [model.hf(input_ids=plain).logits for _ in range(20)]  # beside it
    said = "".join(streamer)
    thread.join()
    assert said == engine.generate(
        model, "Q: hot\nA:", heads=heads, values=3 * values, patched="all", max_new_tokens=12
    )
    with torch.no_grad():
        assert all(torch.equal(logits, model.hf(input_ids=plain).logits) for logits in forwards)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_others_are_untouched(tiny, draw, family):
    """Between its forwards, and from within them: plain forwards, patches, and other starts, on the same model."""
    model = tiny(family)
    heads, values = draw(model, rows=2)
    options = [dict(heads=heads, values=3 * values, patched="all"), dict(heads=~heads, values=values, patched=2)]
    plain = torch.tensor([IDS])

    def others():
        with torch.no_grad():
            logits = model.hf(input_ids=plain).logits
        return logits, engine.patch(model, IDS, heads=heads, values=values)

    want, answers = others(), [handed(model, engine.start(model, IDS, **one), max_new_tokens=6) for one in options]
    starts = [engine.start(model, IDS, **one) for one in options]
    assert all(torch.equal(a, b) for a, b in zip(others(), want, strict=True))
    seen, busy = [], []

    def within(*_):
        if len(seen) < 4 and not busy:
            busy.append(1)
            seen.append(others())
            if starts[1:]:
                assert torch.equal(handed(model, starts.pop(), max_new_tokens=6), answers[1])
            busy.clear()

    handle = model.hf.model.layers[1].mlp.register_forward_pre_hook(Passing(within))
    try:
        got = handed(model, starts[0], max_new_tokens=6, logits_processor=[lambda _, scores: (others(), scores)[1]])
    finally:
        handle.remove()
    assert torch.equal(got, answers[0])
    assert len(seen) == 4
    assert all(torch.equal(a, b) for found in seen for a, b in zip(found, want, strict=True))


def test_the_model_is_as_it_was(model, draw):
    heads, values = draw(model, rows=2)
    plain = torch.tensor([IDS])
    with torch.no_grad():
        before, state = model.hf(input_ids=plain).logits, model.state()
    start = engine.start(model, IDS, heads=heads, values=values)
    assert model.state() == state
    assert not model.foreign_hooks()
    handed(model, start, max_new_tokens=3)
    assert hooks_of(model) == 2
    del start
    assert hooks_of(model) == 0
    assert model.state() == state
    with torch.no_grad():
        assert torch.equal(model.hf(input_ids=plain).logits, before)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_cut_short(model, draw, error):
    """By an error, which passes the hooks, or an interrupt, which does not: the start is gone, the next is right."""
    heads, values = draw(model, rows=2)
    options = dict(heads=heads, values=3 * values, patched="all")

    def cut(*_):
        raise error

    def run():
        with pytest.raises(error):
            handed(model, engine.start(model, IDS, **options), max_new_tokens=3)

    handle = model.hf.model.layers[1].mlp.register_forward_pre_hook(Passing(cut))
    thread = Thread(target=run)  # what an interrupt leaves in a context ends with it
    thread.start()
    thread.join()
    handle.remove()
    gc.collect()
    assert hooks_of(model) == 0
    got = handed(model, engine.start(model, IDS, **options), max_new_tokens=5)
    assert torch.equal(got, hooked(model, heads, 3 * values, max_new_tokens=5))


def test_copies_of_a_start(model, draw):
    """One prompt, several answers: each goes on by itself."""
    heads, values = draw(model, rows=2)
    start = engine.start(model, IDS, heads=heads, values=3 * values, patched="all")
    first, second = copy.deepcopy(start), copy.deepcopy(start)
    want = hooked(model, heads, 3 * values, max_new_tokens=5)
    del start
    assert torch.equal(handed(model, first, max_new_tokens=5), want)
    assert torch.equal(handed(model, second, max_new_tokens=5), want)


def test_a_second_turn(model, draw):
    """Said more after the answer, the cache goes on; steps are counted on."""
    heads, values = draw(model, rows=1)
    start = engine.start(model, IDS, heads=heads, values=3 * values, patched="all")
    told = handed(model, start, max_new_tokens=4)
    more = torch.cat([told, torch.tensor([[30, 31, 32]])], dim=1)
    cache = start["past_key_values"]
    got = handed(
        model, dict(input_ids=more, attention_mask=torch.ones_like(more), past_key_values=cache), max_new_tokens=4
    )
    ids = more[0].tolist()
    for _ in range(4):
        positions = list(range(len(IDS) - 1, len(ids)))
        ids.append(int(engine.naive.patch(model, ids, heads=heads, values=3 * values, positions=positions)[0].argmax()))
    assert got[0].tolist() == ids


@pytest.mark.parametrize("ids", [[7], [7, 8]])
def test_shortest_prompts(model, draw, ids):
    heads, values = draw(model, rows=2)
    start = engine.start(model, ids)
    said = handed(model, start, max_new_tokens=4, prefix_allowed_tokens_fn=lambda *_: ids[:1])  # the prompt again
    assert said.tolist() == [ids + ids[:1] * 4]
    got = handed(model, engine.start(model, ids, heads=heads, values=3 * values, patched="all"), max_new_tokens=5)
    assert got.tolist() == [by_hand("llama", model.hf, ids, row, 3 * values, STEPS["all"], count=5) for row in heads]


def test_prefixes_and_unpatched_rows(model):
    """A prefix is a prompt; without heads, transformers' own answer."""
    ids = torch.tensor([IDS])
    want = model.hf.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, max_new_tokens=5)
    assert torch.equal(handed(model, engine.start(model, engine.prefill(model, IDS)), max_new_tokens=5), want)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("architecture", ["jamba", "deepseek_v3", "unlimited_ocr"])
def test_caches_of_other_kinds(draw, architecture):
    """States beside keys and values; keys of all heads as one; layers of a cache of the model's own."""
    model = models.wrap(architectures.build(architecture))
    heads, values = draw(model, rows=2)
    for patched in ("prompt", "all"):
        start = engine.start(model, IDS, heads=heads, values=3 * values, patched=patched)
        got = handed(model, start, max_new_tokens=5)
        assert torch.equal(got, hooked(model, heads, 3 * values, patched, max_new_tokens=5))


@pytest.mark.filterwarnings("ignore:.*")
def test_pictures_seen_before_count_for_nothing(draw):
    """Qwen-VL would count positions on from the last picture."""
    model = wrapped("qwen2_vl")
    heads, values = draw(model, rows=2)
    options = dict(heads=heads, values=3 * values, patched="all")
    want = handed(model, engine.start(model, IDS, **options), max_new_tokens=5)
    prompt = next(asked_of(model))["prompt"]
    encoded = model.read(prompt)
    model.hf.generate(encoded.ids[None], **encoded.inputs, **GREEDY, max_new_tokens=2)
    assert model.hf.model.rope_deltas.abs().max() > 0
    assert torch.equal(handed(model, engine.start(model, IDS, **options), max_new_tokens=5), want)
