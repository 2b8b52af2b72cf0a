"""A wrapped model gives what transformers gives, at the right place, and is left as it was found."""

import threading

import pytest
import torch
from torch import nn

import engine
import models
from models import Encoded, Segment, zoo
from models.calls import Passing
from tests.conftest import FAMILIES, PACKED
from tests.edits import on_z

IDS = torch.tensor([5, 40, 2, 77, 31, 8, 8, 60, 13, 22, 9])


def projections(hf):
    """W_O of every layer, written out by family."""
    if hasattr(hf, "transformer"):
        return [block.attn.c_proj for block in hf.transformer.h]
    return [block.self_attn.o_proj for block in hf.model.layers]


def state(hf):
    """Everything a call could leave behind."""
    return (
        [len(p._forward_pre_hooks) for p in projections(hf)],
        [name for name, m in hf.named_modules() if isinstance(m, nn.Linear) and "forward" in m.__dict__],
        [m.training for m in hf.modules()],
        hf.config._attn_implementation,
    )


def raw_z(hf, ids, n_heads):
    """What every projection is given, [tokens, layers, heads, head_dim], by hooks of plain torch."""
    kept = []
    handles = [p.register_forward_pre_hook(Passing(lambda _, args: kept.append(args[0]))) for p in projections(hf)]
    with torch.no_grad():
        hf(input_ids=ids)
    for handle in handles:
        handle.remove()
    return torch.stack([z[0].unflatten(-1, (n_heads, -1)) for z in kept], dim=1)


def keep_into(kept):
    def edit(layer, z):
        kept.append(z.clone())
        return z

    return edit


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(tiny, family):
    model = tiny(family)
    with torch.no_grad():
        want = model.hf(IDS[None]).logits[:, -1]
        assert (model.forward(IDS[None]) - want).abs().max() <= 1e-5
        if family in PACKED:
            packed = model.pack([models.Segment(IDS[:-1], IDS[None, -1:])]).logits[0]
            assert (packed - want).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_edit_sees_what_the_projection_is_given(tiny, family):
    """What raw hooks on plain transformers see: of the whole prompt in `forward`, of the rows' tokens in `pack`."""
    model = tiny(family)
    want = raw_z(model.hf, IDS[None], model.shape.n_heads)
    kept = []
    with torch.no_grad():
        model.forward(IDS[None], on_z(model, keep_into(kept)))
    assert (torch.stack(kept, dim=2)[0] - want).abs().max() <= 1e-5
    if family in PACKED:
        kept.clear()
        with torch.no_grad():
            model.pack([models.Segment(IDS[:-3], IDS[None, -3:])], on_z(model, keep_into(kept)))
        assert (torch.stack(kept, dim=2)[0] - want[-3:]).abs().max() <= 1e-5


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("family", FAMILIES)
def test_naive_equals_hooks_by_hand(tiny, draw, family, mode):
    """The definition of right is itself checked against a loop that uses nothing of this project."""
    model = tiny(family)
    hf, n_heads, head_dim = model.hf, model.shape.n_heads, model.shape.head_dim
    heads, values = draw(model, rows=4)
    want = []
    for mask in heads:
        handles = []
        for layer, projection in enumerate(projections(hf)):

            def hook(_, args, layer=layer, mask=mask):
                z = args[0].clone()
                for head in range(n_heads):
                    if mask[layer, head]:
                        columns = slice(head * head_dim, (head + 1) * head_dim)
                        for position in (-1, 4):
                            if mode == "replace":
                                z[0, position, columns] = values[layer, head]
                            else:
                                z[0, position, columns] += values[layer, head]
                return (z,)

            handles.append(projection.register_forward_pre_hook(hook))
        with torch.no_grad():
            want.append(hf(input_ids=IDS[None]).logits[0, -1])
        for handle in handles:
            handle.remove()
    got = engine.naive.patch(model, IDS, heads=heads, values=values, positions=[-1, 4], mode=mode)
    assert (got - torch.stack(want)).abs().max() <= 1e-5
    with torch.no_grad():
        assert (got - hf(input_ids=IDS[None]).logits[0, -1]).abs().amax(dim=1).min() > 1e-3  # every row is patched


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_as_found(family, training, error):
    hf = zoo.tiny(family).train(training)
    hf.lm_head.train(not training)  # flags of their own survive too
    model = models.wrap(hf)
    before = state(hf)
    seen = []

    def edit(layer, z):
        seen.append(state(hf))
        if error and layer == 1:
            raise error("stop")
        return z

    calls = [lambda: model.forward(IDS[None], on_z(model, edit))]
    if family in PACKED:
        calls.append(lambda: model.pack([models.Segment(IDS[:-1], IDS[None, -1:])], on_z(model, edit)))
    for call in calls:
        seen.clear()
        with torch.no_grad():
            if error:
                with pytest.raises(error, match="stop"):
                    call()
            else:
                call()
        assert seen[0] != before  # something was there to be undone
        assert state(hf) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_changes_nothing(tiny, draw, family):
    """Dropout is off within, whatever the model's mode."""
    hf = zoo.tiny(family)
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.5
    training = models.wrap(hf.train())
    with torch.no_grad():
        assert not torch.equal(hf(IDS[None]).logits, hf(IDS[None]).logits)  # dropout is real
    heads, values = draw(training)
    options = dict(heads=heads, values=values, positions=-3)
    for strategy in ("auto", "expanded", "batch", "naive"):
        got = engine.patch(training, IDS, strategy=strategy, **options)
        assert torch.equal(got, engine.patch(tiny(family), IDS, strategy=strategy, **options))
    assert all(m.training for m in hf.modules())


def test_hooks_of_others_still_run(draw):
    """A hook that the caller has put on the model sees the call, and stays."""
    model = models.wrap(zoo.tiny("llama"))
    heads, values = draw(model)
    calls = []
    handle = model.projections[1].register_forward_pre_hook(Passing(lambda *_: calls.append(1)))
    assert model.foreign_hooks() == []
    engine.patch(model, IDS, heads=heads, values=values)
    before = model.state()
    calls.clear()
    engine.patch(model, IDS, heads=heads, values=values)
    assert calls == [1]
    assert list(model.projections[1]._forward_pre_hooks) == [handle.id]
    assert model.state() == before


def test_shapes():
    """Width, heads and head_dim are read from the model, not guessed from each other."""
    read = {family: models.wrap(zoo.tiny(family)).shape for family in FAMILIES}
    assert read["llama"] == models.Shape(3, 6, 2, 8, 48, 97, 128)
    assert read["qwen3"] == models.Shape(3, 6, 2, 16, 48, 97, 128)  # heads * head_dim = 96
    assert read["gpt2"] == models.Shape(3, 5, 5, 8, 40, 97, 128)
    assert read["mistral"] == models.Shape(3, 6, 2, 8, 48, 97, 128)


def test_shape_of_the_real_model(smollm2):
    assert smollm2.shape == models.Shape(30, 9, 3, 64, 576, 49152, 8192)
    assert smollm2.rules() == models.Capabilities(longer=smollm2.rules().longer)


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_projections(family):
    hf = zoo.tiny(family)
    found = models.wrap(hf).projections
    assert all(a is b for a, b in zip(found, projections(hf), strict=True))


def test_says_why_rows_are_not_packed():
    """Refused unless known to be exact; the reason is given."""
    assert all(models.wrap(zoo.tiny(family)).rules().packed == "" for family in PACKED)
    hf = zoo.tiny("qwen3")
    hf.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert "linear_attention" in models.wrap(hf).rules().packed
    hf = zoo.tiny("llama")
    hf._supports_attention_backend = False
    assert "attention interface" in models.wrap(hf).rules().packed


def test_two_models_interleaved(tiny, draw):
    first, second = tiny("llama"), tiny("qwen3")
    (heads, values), (other_heads, other_values) = draw(first), draw(second)
    want = engine.patch(first, IDS, heads=heads, values=values)
    other_want = engine.patch(second, IDS, heads=other_heads, values=other_values)

    inner = []

    def edit(layer, z):  # a call to another model, and to this one, from within a call
        inner.append(engine.patch(second, IDS, heads=other_heads, values=other_values))
        return z

    with torch.no_grad():
        plain = first.pack([models.Segment(IDS[:-1], IDS[None, -1:])]).logits
        edits = on_z(first, edit)
        assert torch.equal(first.pack([models.Segment(IDS[:-1], IDS[None, -1:])], edits).logits, plain)
    assert len(inner) == 3
    assert all(torch.equal(got, other_want) for got in inner)
    assert torch.equal(engine.patch(first, IDS, heads=heads, values=values), want)


def test_two_threads_on_two_models(tiny, draw):
    jobs = {}
    for family in ("llama", "qwen3"):
        model = tiny(family)
        jobs[family] = (model, *draw(model, rows=9))

    def work(family, into):
        model, heads, values = jobs[family]
        for position in range(-11, 0):
            into.append(engine.patch(model, IDS, heads=heads, values=values, positions=position))

    alone = {family: [] for family in jobs}
    together = {family: [] for family in jobs}
    for family in jobs:
        work(family, alone[family])
    threads = [threading.Thread(target=work, args=(family, together[family])) for family in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for family in jobs:
        assert len(together[family]) == 11
        for one, other in zip(alone[family], together[family], strict=True):
            assert (one - other).abs().max() <= 1e-6
    assert all(state(jobs[family][0].hf) == state(zoo.tiny(family)) for family in jobs)


@pytest.mark.parametrize("family", PACKED)
def test_only_rows_reach_the_vocabulary(tiny, draw, family):
    """The packed forward projects R tokens to the vocabulary, not the prompt's; a prefill projects none."""
    model = tiny(family)
    heads, values = draw(model, rows=7)
    seen = []
    handle = model.hf.lm_head.register_forward_pre_hook(Passing(lambda _, args: seen.append(args[0].shape[1])))
    try:
        engine.patch(model, IDS, heads=heads, values=values, positions=-3, strategy="packed")
        engine.patch(model, [IDS, IDS], heads=heads, values=values, strategy="packed")
        engine.prefill(model, IDS)
    finally:
        handle.remove()
    assert seen == [7, 14, 0]


def test_encode_and_decode(model):
    text = "Q: hot\nA:"
    assert model.decode(model.encode(text)) == text
    assert model.encode(torch.tensor([1, 2], dtype=torch.uint8)).dtype == torch.long


def test_after_the_last_attention_only_rows_are_computed(model):
    """Tokens that each block's MLP computes: nothing reads what the last would give for the context."""
    seen = []
    handles = [
        block.mlp.down_proj.register_forward_pre_hook(Passing(lambda _, args: seen.append(args[0].shape[1])))
        for block in model.decoder.layers
    ]
    try:
        model.pack([Segment(torch.arange(9), torch.arange(3)[:, None])])
        assert seen == [12] * (model.shape.n_layers - 1) + [3]
        seen.clear()
        model.prefill([Encoded(torch.arange(9))], [9])
        assert seen == [9] * (model.shape.n_layers - 1) + [1]
        seen.clear()
        model.forward(torch.arange(9)[None])
        assert seen == [9] * model.shape.n_layers
    finally:
        for handle in handles:
            handle.remove()
