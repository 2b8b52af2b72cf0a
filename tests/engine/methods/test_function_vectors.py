"""A function vector is what its heads write; added at a layer it is a hook there; on the real model it works."""

import pytest
import torch

import engine
from engine import fv, tasks
from engine.tasks import Example
from models import zoo
from tests.edits import after

PROMPTS = ["Q: hot\nA: cold\n\nQ: big\nA:", "Q: up\nA: down\n\nQ: in\nA:"]
EXAMPLES = [Example(prompt, 5) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "opt", "qwen3"])
def test_a_vector_is_what_its_heads_write(tiny, random, family):
    """W_O on z with all other heads at zero, less W_O on zeros (the bias): by the module itself."""
    model = tiny(family)
    shape = model.shape
    means = torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random)
    heads = [(0, 1), (2, 0), (2, shape.n_heads - 1)]
    want = torch.zeros(shape.d_model)
    for layer, head in heads:
        z = torch.zeros(shape.n_heads, shape.head_dim)
        z[head] = means[layer, head]
        w_o = model.projections[layer]
        with torch.no_grad():
            want += (w_o(z.flatten()[None, None]) - w_o(torch.zeros(1, 1, z.numel())))[0, 0]
    torch.testing.assert_close(fv.compose(model, means, heads), want, atol=1e-5, rtol=1e-5)


def test_extract(model):
    means = engine.mean_activations(model, PROMPTS, progress=False)
    vector, effects = fv.extract(model, PROMPTS, EXAMPLES, k=3, progress=False)
    target = tasks.first_token(model, EXAMPLES[0])
    for layer, head in ((0, 0), vector.heads[0]):
        before, after = (
            engine.naive.patch(model, PROMPTS[0], heads=heads, values=means).softmax(-1)[0, target]
            for heads in (None, [(layer, head)])
        )
        torch.testing.assert_close(effects.effect[0, layer, head].float(), after - before, atol=1e-6, rtol=0)
    ranked = sorted(vector.heads, key=lambda head: -effects.mean[head])
    assert vector.heads == ranked
    assert effects.mean[ranked[-1]] >= effects.mean.flatten().sort(descending=True).values[2]
    torch.testing.assert_close(vector.vector, fv.compose(model, means, vector.heads))


def test_a_beginning_of_text_and_correct_queries(model, monkeypatch):
    """Prompts begin with one token more; means and effects are of those that the unshuffled prompt is right on."""
    wrapped = engine.naive.patch(model, PROMPTS, heads=None, values=None)
    right = [int(logits[0].argmax()) for logits in wrapped]
    clean = [Example(PROMPTS[0], right[0]), Example(PROMPTS[1], (right[1] + 1) % 97)]
    shuffled = [Example(prompt.upper(), example.answer) for prompt, example in zip(PROMPTS, clean, strict=True)]
    vector, effects = fv.extract(model, clean, shuffled, k=3, correct_only=True, progress=False)
    want, same = fv.extract(model, PROMPTS[:1], shuffled[:1], k=3, progress=False)
    assert torch.equal(vector.vector, want.vector)
    assert torch.equal(effects.patched, same.patched)

    monkeypatch.setattr(type(model.tokenizer), "bos_token_id", 7, raising=False)
    begun = fv.begun(model, [PROMPTS[0], EXAMPLES[1]])
    assert begun[0] == [7, *model.encode(PROMPTS[0]).tolist()]
    assert begun[1] == Example([7, *model.encode(PROMPTS[1]).tolist()], [5])
    assert fv.begun(model, [begun[0]]) == [begun[0]]  # once
    vector, effects = fv.extract(model, PROMPTS, EXAMPLES, k=3, bos=True, progress=False)
    want, same = fv.extract(model, fv.begun(model, PROMPTS), fv.begun(model, EXAMPLES), k=3, progress=False)
    assert torch.equal(vector.vector, want.vector)
    assert torch.equal(effects.clean, same.clean)


def test_hits_by_layer_are_those_of_hooks(model, random):
    vector = torch.randn(model.shape.d_model, generator=random)
    found = fv.hits_by_layer(model, EXAMPLES, vector)
    for layer in (*range(model.shape.n_layers), None):
        row = model.shape.n_layers if layer is None else layer
        for index, example in enumerate(EXAMPLES):
            logits = engine.naive.patch(model, example.prompt, after(model, vector, [layer]))[0]
            assert found[index, row] == (logits.argmax() == tasks.first_token(model, example))


def test_saved_and_loaded(tmp_path, model):
    vector = fv.FunctionVector(torch.randn(model.shape.d_model), [(2, 1), (0, 3)], {"model": model.name})
    vector.save(tmp_path / "v.safetensors")
    again = fv.FunctionVector.load(tmp_path / "v.safetensors")
    assert torch.equal(again.vector, vector.vector)
    assert again.heads == vector.heads
    assert again.metadata == vector.metadata


def test_shuffled_demonstrations_keep_their_words():
    task = tasks.load("antonyms")
    plain, shuffled = (task.few_shot(task.pairs, 10, 5, seed=3, shuffled=s) for s in (False, True))
    for one, other in zip(plain, shuffled, strict=True):
        assert one.answer == other.answer
        assert one.prompt != other.prompt
        assert one.prompt.rsplit("Q:", 1)[1] == other.prompt.rsplit("Q:", 1)[1]
        assert sorted(one.prompt.split()) == sorted(other.prompt.split())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*several tokens")
def test_on_the_real_model(smollm2):
    """Past tense: ten heads found on two shuffled prompts, their vector at one layer, on 30 held-out words."""
    task = tasks.load("past_tense")
    split = task.split(0)
    clean = [example.prompt for example in task.few_shot(split.train, 5, 20)]
    vector, _ = fv.extract(smollm2, clean, task.few_shot(split.train, 5, 2, seed=1, shuffled=True), progress=False)
    queries = task.queries(split.test[:30], split.train, 5, seed=2, shuffled=True)
    hits = tasks.first_token_hits(smollm2, queries, after(smollm2, vector.vector, [18, None])).float().mean(0)
    assert hits[0] >= hits[1] + 0.2


def test_w_o_without_an_offset():
    """Models whose weights are not here say so."""
    hf = zoo.tiny("llama").to("meta")
    import models

    with pytest.raises(models.UnsupportedModelError, match="W_O"):
        models.wrap(hf).project(0, torch.zeros(6, 8))
