"""Patching through TransformerLens: exact by every strategy, and the same as on the transformers model itself."""

import sys

import pytest
import torch
from PIL import Image

import engine
import models
from models import dense, lens
from models.huggingface import HuggingFace
from models.packed import Layout
from models.tiny import IMAGE_TEXT, TEXT, image_marker, tiny, tiny_processor, tiny_tokenizer
from tests.conftest import quick
from tests.edits import on_z

pytest.importorskip("transformer_lens")

# Families that TransformerLens does not bridge, or not exactly.
REFUSED = {
    "falcon_alibi": "computes other logits than transformers",
    "idefics2": "Unsupported architecture",
    "smolvlm": "Unsupported architecture",
    "qwen2_vl": "Unsupported architecture",
    "qwen2_5_vl": "torchvision",
    "qwen3_vl": "torchvision",
    "paligemma": "Unsupported architecture",
    "internvl": "Unsupported architecture",
    "mllama": "Unsupported architecture",
}
SUPPORTED = [family for family in TEXT if family not in REFUSED]
SEEING = [family for family in IMAGE_TEXT if family not in REFUSED]
UNPACKED = {"bloom"}  # ALiBi


def strategies(family):
    return [s for s in ("auto", "packed", "expanded", "batch") if s != "packed" or family not in UNPACKED]


@pytest.fixture(scope="module")
def both():
    """A function of the family: the model bridged, and the same weights untouched; made once."""
    made = {}

    def make(family="llama"):
        if family not in made:
            hf = tiny(family)
            processor = tiny_processor(family) if family in IMAGE_TEXT else None
            tokenizer = None if processor else tiny_tokenizer()
            bridged = lens.from_huggingface(hf, tokenizer, processor, name=family)
            made[family] = bridged, models.wrap(hf, tokenizer, processor=processor, name=family)
        return made[family]

    return make


def exact(got, want, limit=1e-5):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= limit


def hooks(bridge):
    """Every hook in place: some families bring their own."""
    points = {id(point): point for point in bridge.hook_dict.values()}
    return sorted(id(handle) for point in points.values() for handle in (*point.fwd_hooks, *point.bwd_hooks))


@pytest.mark.parametrize("n_tokens", quick([1, 2, 7, 33], 1, 33))
@pytest.mark.parametrize("family", SUPPORTED)
def test_agrees_with_naive(both, draw, random, family, n_tokens):
    model, reference = both(family)
    before = hooks(model.bridge)
    heads, values = draw(model, rows=3)
    ids = torch.randint(97, (n_tokens,), generator=random)
    for positions in [-1, [0], *([[-3, -1]] if n_tokens > 2 else [])]:
        options = dict(heads=heads, values=values, positions=positions)
        want = engine.naive.patch(reference, ids, **options)
        exact(engine.naive.patch(model, ids, **options), want)
        for strategy in strategies(family):
            exact(engine.patch(model, ids, strategy=strategy, **options), want)
    assert hooks(model.bridge) == before


@pytest.mark.parametrize("family", SUPPORTED)
def test_modes_and_values_of_each_row(both, draw, random, family):
    model, reference = both(family)
    heads, values = draw(model, rows=3, per_row=True)
    ids = torch.randint(97, (11,), generator=random)
    options = dict(heads=heads, values=values, positions=[-2, 5], mode="add")
    want = engine.naive.patch(reference, ids, **options)
    for strategy in strategies(family):
        exact(engine.patch(model, ids, strategy=strategy, **options), want)


@pytest.mark.parametrize("family", SUPPORTED)
def test_several_prompts_and_reused_prefixes(both, draw, random, family):
    model, reference = both(family)
    heads, values = draw(model, rows=4)
    prompts = [torch.randint(97, (n,), generator=random) for n in (9, 1, 2, 30)]
    mixed = [prompts[0], engine.prefill(model, prompts[1]), prompts[2], engine.prefill(model, prompts[3])]
    want = engine.naive.patch(reference, prompts, heads=heads, values=values)
    exact(engine.patch(model, mixed, heads=heads, values=values), want)
    prefix = mixed[3]
    for positions in (-1, -1, 5, 0):
        want = engine.naive.patch(reference, prompts[3], heads=heads, values=values, positions=positions)
        exact(engine.patch(model, prefix, heads=heads, values=values, positions=positions), want)


@pytest.mark.parametrize("family", SUPPORTED)
def test_generation(both, draw, family):
    model, reference = both(family)
    heads, values = draw(model, rows=2)
    options = dict(heads=heads, values=values, max_new_tokens=4)
    for prompts in ("Q: hot\nA:", ["ab", "Q: up\nA: down"]):
        assert engine.generate(model, prompts, **options) == engine.generate(
            reference, prompts, strategy="naive", **options
        )


@pytest.mark.parametrize("family", SEEING)
def test_images(both, draw, family):
    model, reference = both(family)
    heads, values = draw(model, rows=3)
    pictures = tuple(Image.new("RGB", (28, 28), color) for color in ("red", "blue"))
    text = "".join(f"Q: {image_marker(family)} colour?\nA:" for _ in pictures)
    prompt = models.Prompt(text, pictures)
    for positions in (-1, [-3, -1]):
        options = dict(heads=heads, values=values, positions=positions)
        want = engine.naive.patch(reference, prompt, **options)
        exact(engine.naive.patch(model, prompt, **options), want)
        for strategy in ("auto", "packed", "expanded", "batch"):
            exact(engine.patch(model, prompt, strategy=strategy, **options), want)


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family):
    with pytest.raises(models.UnsupportedModelError, match=REFUSED[family]):
        lens.from_huggingface(tiny(family))


def test_what_is_not_packed(both):
    model, _ = both("bloom")
    assert "ALiBi" in model.rules().packed
    assert engine.plan(model, [5] * 20, rows=4).strategy == "expanded"
    segment = models.Segment(torch.tensor([1, 2]), torch.tensor([[3]]))
    with pytest.raises(models.UnsupportedModelError, match="ALiBi"):
        model.pack([segment])


@pytest.mark.parametrize("family", SUPPORTED)
def test_reads_the_model(both, family):
    model, reference = both(family)
    assert isinstance(model, models.Model)
    assert model.shape == reference.shape
    assert (model.dtype, model.device, model.eos) == (reference.dtype, reference.device, reference.eos)
    assert model.encode("Q: hot").tolist() == reference.encode("Q: hot").tolist()


def test_edit_sees_hook_z(both):
    """What TransformerLens caches as z, of the whole prompt and of packed rows."""
    model, _ = both("qwen3")
    ids, seen = torch.tensor([5, 40, 2, 77, 31, 8]), []

    def edit(layer, z):
        seen.append(z.clone())
        return z

    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(ids[None])
        want = torch.stack([cache[f"blocks.{layer}.attn.hook_z"] for layer in range(3)])
        model.forward(ids[None], on_z(model, edit))
        exact(torch.stack(seen), want)
        seen.clear()
        model.pack([models.Segment(ids[:4], ids[None, 4:])], on_z(model, edit))
        exact(torch.stack(seen), want[:, :, 4:])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_left_as_found(both, error):
    model, _ = both()
    ids = torch.tensor([5, 40, 2, 77])
    calls = []
    model.bridge.add_hook("blocks.1.hook_out", lambda x, hook: calls.append(x.shape))

    def edit(layer, z):
        if layer == 2:
            raise error("stop")
        return z + 1

    before, present = model.forward(ids[None]).detach(), hooks(model.bridge)
    for call in (
        lambda: model.forward(ids[None], on_z(model, edit)),
        lambda: model.pack([models.Segment(ids[:3], ids[None, 3:])], on_z(model, edit)),
    ):
        with pytest.raises(error, match="stop"):
            call()
        assert hooks(model.bridge) == present  # the caller's own
        exact(model.forward(ids[None]).detach(), before, limit=0)
    assert len(calls) == 5
    model.bridge.reset_hooks()


def test_given_model_is_untouched(random):
    hf, tokenizer = tiny("llama"), tiny_tokenizer()
    ids = torch.randint(97, (1, 9), generator=random)
    modules, size = [(name, type(module)) for name, module in hf.named_modules()], len(tokenizer)
    weights = {name: parameter.clone() for name, parameter in hf.named_parameters()}
    config = hf.config.to_dict()
    with torch.no_grad():
        want = hf(ids).logits
        model = lens.from_huggingface(hf, tokenizer)
        model.forward(ids, on_z(model, lambda layer, z: z + 1))
        assert torch.equal(hf(ids).logits, want)
    assert modules == [(name, type(module)) for name, module in hf.named_modules()]
    assert all(torch.equal(parameter, weights[name]) for name, parameter in hf.named_parameters())
    assert (hf.config.to_dict(), len(tokenizer), tokenizer.eos_token) == (config, size, None)


def test_gradient_with_respect_to_values(both, draw):
    model, reference = both()
    heads, values = draw(model, rows=2)

    def gradient(patch, model, **options):
        leaf = values.clone().requires_grad_()
        logits = patch(model, "Q: hot\nA:", heads=heads, values=leaf, positions=[-3, -1], **options)
        logits.logsumexp(dim=-1).sum().backward()
        model.hf.zero_grad()
        return leaf.grad

    want = gradient(engine.naive.patch, reference)
    for strategy in ("packed", "expanded", "batch", "naive"):
        exact(gradient(engine.patch, model, strategy=strategy), want)


@pytest.mark.filterwarnings("ignore::UserWarning:transformer_lens")
def test_compatibility_mode(draw, random):
    """Processed weights, and hooks with two names: still exact against the bridge as it then is."""
    model = lens.from_huggingface(tiny("llama"))
    model.bridge.enable_compatibility_mode(disable_warnings=True)
    model = lens.TransformerLens(model.bridge)
    heads, values = draw(model, rows=3)
    ids = torch.randint(97, (13,), generator=random)
    options = dict(heads=heads, values=values, positions=[-3, -1], mode="add")
    want = engine.naive.patch(model, ids, **options)
    for strategy in ("packed", "expanded", "batch"):
        exact(engine.patch(model, ids, strategy=strategy, **options), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(draw, random, dtype):
    model = lens.from_huggingface(tiny("llama").to(dtype))
    reference = HuggingFace(tiny("llama").double())
    heads, values = draw(model, rows=8)
    ids = torch.randint(97, (21,), generator=random)
    truth = engine.naive.patch(reference, ids, heads=heads, values=values)
    naive, packed = (
        patch(model, ids, heads=heads, values=values).double() for patch in (engine.naive.patch, engine.patch)
    )
    # The bridge takes its softmax in float32 whatever the dtype.
    exact(packed, naive, limit=1e-5 if dtype == torch.float64 else 2 * float((naive - truth).abs().max()))


def test_many_prompts_are_prefilled_alone(both, random, monkeypatch):
    model, _ = both("gemma2")
    prompts = [model.read(torch.randint(97, (n,), generator=random)) for n in (12, 3, 20)]
    together = model.prefill(prompts, [11, 3, 9])
    monkeypatch.setattr(lens, "PREFILL_TOKENS", 10)
    for one, other in zip(together, model.prefill(prompts, [11, 3, 9]), strict=True):
        exact(torch.stack(one.keys), torch.stack(other.keys))
        exact(torch.stack(one.values), torch.stack(other.values))


def test_who_sees_whom():
    """Two segments, one of them with a context at hand and rows that already have a token of their own."""
    zeros = torch.zeros(1, 2, 4)
    ready, past = models.KeyValues([zeros], [zeros]), models.KeyValues([zeros[:, None, :1]], [zeros[:, None, :1]])
    segments = [
        models.Segment(torch.tensor([1, 2, 3]), torch.tensor([[4]])),
        models.Segment(ready, torch.tensor([[5]]), past),
    ]
    queries, cached = dense.find(Layout(segments, keep=False, n_layers=1), torch.device("cpu"))
    keys = cached + queries
    # keys: context and earlier token of the second | context of the first | row of the first | row of the second
    want = [
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 0, 0, 1],
    ]
    assert dense.sees(queries, keys).int().tolist() == want
    assert dense.sees(queries, keys, window=2).int()[3:].tolist() == [
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 1, 0, 0, 0, 0, 1],
    ]
    two = [models.Segment(torch.tensor([1]), torch.tensor([[4], [5]]))]
    queries, cached = dense.find(Layout(two, keep=False, n_layers=1), torch.device("cpu"))
    assert not len(cached.row)
    assert dense.sees(queries, queries).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


def test_is_bridge(both, monkeypatch):
    model, _ = both()
    assert lens.is_bridge(model.bridge)
    assert not lens.is_bridge(model.hf)
    monkeypatch.delitem(sys.modules, "transformer_lens.model_bridge")
    assert not lens.is_bridge(model.hf)
    assert "transformer_lens.model_bridge" not in sys.modules


def test_without_transformer_lens(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge.sources", None)
    with pytest.raises(ImportError, match=r"pip install 'headpatch\[lens\]'"):
        lens.from_huggingface(tiny("llama"))
