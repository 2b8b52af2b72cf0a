"""transformers' models, and what `models` wraps of them."""

import pytest
import torch

import engine
import models
from engine import weights
from engine.weights import looking
from models import zoo
from tests.engine.weights.networks import by_hand, draw, finetuned, off

SLOW = [
    pytest.param(family, marks=pytest.mark.slow)
    for family in ("gptj", "gpt_neox", "opt", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "falcon_alibi", "bloom",
                   "olmo2", "roberta", "clip_text")
]  # fmt: skip
# Experts go by token, whose rows are sorted by expert.
APART = {"mixtral": {f"model.layers.{i}.mlp.experts" for i in range(3)}}
ONE = {"mixtral": torch.float32}  # its experts are not multiplied in float64


def ask(family, batch=5, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    if family in ("vit", "clip_vision"):
        return {"pixel_values": torch.randn(batch, 3, 28, 28, generator=draw, dtype=dtype)}
    asked = {"input_ids": torch.randint(97, (batch, 7), generator=draw)}
    if family in ("bert", "llama"):  # padded on the right, on the left
        asked["attention_mask"] = torch.ones(batch, 7, dtype=torch.long)
        asked["attention_mask"][1, 5:] = 0 if family == "bert" else 1
        asked["attention_mask"][2, :3] = 0 if family == "llama" else 1
    return asked


@pytest.mark.parametrize(
    "family", ["vit", "bert", "gpt2", "llama", "mixtral", "falcon", "gemma3", "clip_vision", *SLOW]
)
def test_family(family):
    dtype = ONE.get(family, torch.float64)
    base = zoo.tiny(family).to(dtype)
    tuned = finetuned(base, by=0.05)
    vectors = weights.task_vectors(base, *tuned)
    inputs, c = ask(family, dtype=dtype), draw(vectors, 5, dtype=dtype)
    with torch.no_grad():
        want = by_hand(base, tuned, {**inputs, "use_cache": False} if base.can_generate() else inputs, c)
        for way in ("merge", "wide"):
            got = weights.forward(base, inputs, vectors, c, way=way)
            assert off(got, want) <= (1e-12 if dtype == torch.float64 else 1e-5)
    assert set().union(*(layout.apart for layout in looking._known[base].values())) == APART.get(family, set())


def test_a_wrapped_model_is_taken_as_it_is():
    hf = zoo.tiny("llama")
    vectors = weights.task_vectors(hf, *finetuned(hf, by=0.05))
    wrapped, inputs = models.wrap(hf, name="tiny"), ask("llama")
    c = draw(vectors, 5, dtype=torch.float32)
    got, want = (weights.forward(model, inputs, vectors, c).logits for model in (wrapped, hf))
    assert torch.equal(got, want)
    assert weights.task_vectors(wrapped, hf).base == "tiny"


def test_patches_of_a_merged_model():
    """One merge: every verb runs it. With weights of each sample's own there is one merge a sample."""
    hf = zoo.tiny("llama")
    (tuned,) = finetuned(hf, 1, by=0.05)
    vectors, model = weights.task_vectors(hf, tuned), models.wrap(hf)
    shape = model.shape
    values = torch.randn(shape.n_layers, shape.n_heads, shape.head_dim)
    asked = dict(prompt=[3, 1, 4, 1, 5], heads=[(0, 1), (2, 3)], values=values)
    before, want = engine.patch(model, **asked), engine.patch(models.wrap(tuned), **asked)
    with weights.merged(model, vectors, torch.ones(1, len(vectors.blocks()))):
        torch.testing.assert_close(engine.patch(model, **asked), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(engine.naive.patch(model, **asked), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(engine.patch(model, **asked), before)


def test_half_precision():
    base = zoo.tiny("gpt2").to(torch.bfloat16)
    vectors = weights.task_vectors(base, *finetuned(base, by=0.05))
    c = draw(vectors, 5, dtype=torch.float32)
    with torch.no_grad():
        got, want = (f(base, ask("gpt2"), vectors, c).logits for f in (weights.forward, weights.naive.forward))
    assert got.dtype == torch.bfloat16
    assert off(got, want) <= 0.05
