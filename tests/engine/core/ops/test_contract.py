"""An edit may write to z and return it, or return a new tensor: every backend uses what is returned, and hands over a z
that may be written to. `make_edits` write to it unless gradients are recorded.
"""

import dataclasses
from functools import partial
from itertools import pairwise

import pytest
import torch

import models
from engine.core.edits import Ready, make_edits, patch_units, spans
from engine.core.patches import Change, Patch
from models import lens, nnsight_backend, zoo
from models.calls import Passing
from models.hooks import edited
from models.layout import Rows
from models.sites import SITES, Place
from tests.edits import on_z

IDS = torch.tensor([5, 40, 2, 77, 31, 8])
ROWS = torch.tensor([[1, 2], [3, 4], [5, 6]])
BACKENDS = {
    "huggingface": models.wrap,
    "transformer_lens": lens.from_huggingface,
    "nnsight": nnsight_backend.from_huggingface,
}


@pytest.fixture(scope="module")
def backend():
    made = {}

    def make(name):
        if name not in made:
            made[name] = BACKENDS[name](zoo.tiny("llama"))
        return made[name]

    return make


def by_layer(model, edit):
    return {} if edit is None else on_z(model, edit)


def passes(model):
    """A forward, and packed sequences: with a context computed in them, with one at hand, with a single row."""
    with torch.no_grad():
        context = model.prefill([models.interface.Encoded(IDS)], [len(IDS)])[0]
    return {
        "forward": lambda edit: model.forward(ROWS, by_layer(model, edit)),
        "expanded": lambda edit: model.forward(ROWS, by_layer(model, edit), context),
        "fresh": lambda edit: model.pack([models.Segment(IDS, ROWS)], by_layer(model, edit)).logits[0],
        "reused": lambda edit: model.pack([models.Segment(context, ROWS)], by_layer(model, edit)).logits[0],
        "one row": lambda edit: model.pack([models.Segment(context, ROWS[:1])], by_layer(model, edit)).logits[0],
    }


def write(layer, z):
    z[:, -1, layer::2] = 0.5
    return z


def replace(layer, z):
    return write(layer, z.clone())


@pytest.mark.parametrize("name", BACKENDS)
def test_written_or_returned(backend, name):
    model = backend(name)
    with torch.no_grad():
        for which, run in passes(model).items():
            plain, written, returned = run(None), run(write), run(replace)
            assert torch.equal(written, returned), which
            assert (written - plain).abs().amax(dim=1).min() > 1e-3, which


@pytest.mark.parametrize("name", BACKENDS)
def test_written_while_gradients_are_recorded(backend, name):
    """Of values, through an edit in place: those of an edit that returns a new tensor."""
    model = backend(name)
    for which, run in passes(model).items():
        gradients = []
        for copied in (False, True):
            values = torch.ones(8, requires_grad=True)

            def edit(layer, z, copied=copied, values=values):
                z = z.clone() if copied else z
                z[:, -1, 1] = values
                return z

            run(edit).logsumexp(dim=-1).sum().backward()
            gradients.append(values.grad)
        assert gradients[0].abs().max() > 0
        torch.testing.assert_close(gradients[0], gradients[1], msg=which)
    model.hf.zero_grad()


def test_what_hooks_of_others_hold_is_not_written_to():
    """Whoever keeps the input of a projection, or hook_z, of a forward keeps what it saw."""
    held = []

    def hold(x):
        held.append((x, x.clone()))

    model = models.wrap(zoo.tiny("llama"))
    handle = model.projections[1].register_forward_pre_hook(Passing(lambda _, args: hold(args[0])))
    bridged = lens.from_huggingface(zoo.tiny("llama"))
    with torch.no_grad():
        model.forward(ROWS, on_z(model, write))
        handle.remove()
        with bridged.bridge.hooks(fwd_hooks=[(bridged._hooks[1], lambda z, hook: hold(z))]):
            bridged.forward(ROWS, on_z(bridged, write))
            bridged.pack([models.Segment(IDS, ROWS)], on_z(bridged, write))
    assert len(held) == 3
    assert all(torch.equal(x, before) for x, before in held)


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("own", [True, False])
def test_packed_rows_are_edited_where_they_lie(model, first, own):
    """In a sequence of any strides; what stands before them is left alone. A copy, if others may hold the sequence."""
    shape = model.shape
    width = shape.n_heads * shape.head_dim
    place = Place(SITES["z"], model.projections, [(shape.n_heads, shape.head_dim)] * 3)
    for x in (torch.randn(1, first + 6, width), torch.randn(width, first + 6).T[None]):
        before = x.clone()
        with torch.no_grad():
            found = edited(partial(write, 0), x, place, 0, Rows(2, [3, 3, 3]), own)
        assert (found is x) == own
        assert edited(partial(write, 0), before.clone(), place, 0, Rows(2, [3, 3, 3]), own).equal(found)  # recorded
        assert own or torch.equal(x, before)
        rows = replace(0, before[0, first:].reshape(3, 2, shape.n_heads, -1))
        assert torch.equal(found[:, :first], before[:, :first])
        assert torch.equal(found[0, first:].reshape(rows.shape), rows)


def draw(model, per_row, random, rows=3, mode="replace", positions=1):
    s = model.shape
    heads = torch.rand(rows, s.n_layers, s.n_heads, generator=random) < 0.5
    heads[:, 2] = False
    lead = (rows if per_row else 1, positions)
    values = torch.randn(*lead, s.n_layers, s.n_heads, s.head_dim, generator=random)
    return Change(Patch("z", heads, values, -1, mode), "z", heads, (-1,), values)


def z_edits(model, change, tail, n_prompts=1):
    """The edit of every layer; of those where nothing is patched there is none."""
    edits = make_edits(model, [(change, [(token, p) for p, token in enumerate(tail)])], n_prompts)
    assert list(edits) == ["z"]
    assert sorted(edits["z"]) == change.units.any(dim=2).any(dim=0).nonzero().flatten().tolist()
    return edits["z"]


def by_hand(change, layer, z, tail, n_prompts):
    z, n_rows = z.clone(), len(change.units)
    for row in range(n_prompts * n_rows):
        r = row % n_rows
        for h in change.units[r, layer].nonzero()[:, 0].tolist():
            for p, t in enumerate(tail):
                value = change.values[r if len(change.values) > 1 else 0]
                value = value[p if len(value) > 1 else 0, layer, h]
                old = z[row, t, h].clone()
                z[row, t, h] = {"replace": value, "add": old + value, "scale": old * value}[change.mode]
    return z


@pytest.mark.parametrize("tail", [(0,), (3,), (0, 1, 2, 3), (0, 2), (1, 2), (0, 1, 3)])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("per_position", [True, False])
@pytest.mark.parametrize(("n_prompts", "mode"), [(1, "replace"), (2, "add"), (2, "scale")])
def test_make_edits_write_to_z(model, random, tail, per_row, per_position, n_prompts, mode):
    change = draw(model, per_row, random, mode=mode, positions=len(tail) if per_position else 1)
    edits = z_edits(model, change, tail, n_prompts)
    recorded = z_edits(
        model, dataclasses.replace(change, values=change.values.clone().requires_grad_()), tail, n_prompts
    )
    assert sorted(edits) == [0, 1]
    for layer in edits:
        z = torch.randn(3 * n_prompts, 4, model.shape.n_heads, model.shape.head_dim, generator=random)
        want, before = by_hand(change, layer, z, tail, n_prompts), z.clone()
        assert torch.equal(recorded[layer](z), want)
        assert torch.equal(z, before)
        assert edits[layer](z) is z
        assert torch.equal(z, want)


def test_gradients_through_several_spans(model, random):
    change = draw(model, True, random)
    values = change.values.clone().requires_grad_()
    z = torch.randn(3, 4, model.shape.n_heads, model.shape.head_dim, generator=random, requires_grad=True)
    z_edits(model, dataclasses.replace(change, values=values), (0, 1, 3))[0](z).sum().backward()
    on = change.units[:, 0, :, None].expand(3, model.shape.n_heads, model.shape.head_dim)
    assert torch.equal(values.grad[:, 0, 0], 3.0 * on)
    assert torch.equal(z.grad[:, 2], torch.ones_like(on, dtype=torch.float32))
    assert all(torch.equal(z.grad[:, t], 1.0 * ~on) for t in (0, 1, 3))


def test_masks_and_values_follow_z(model, random):
    """To the device and the dtype of the layer it comes from. The other device, where there is none, is "meta"."""
    change = draw(model, False, random)
    edits = z_edits(model, change, (0, 2))
    z = torch.randn(3, 4, model.shape.n_heads, model.shape.head_dim, generator=random)
    for layer in (0, 1):
        away = z.to("meta")
        assert edits[layer](away) is away
        assert torch.equal(edits[layer](z.double()), by_hand(change, layer, z.double(), (0, 2), 1))
        assert torch.equal(edits[layer](z.clone()), by_hand(change, layer, z, (0, 2), 1))


def test_several_changes_act_in_order(model, random):
    """At one site and layer; at layers that only some of them are at, those alone."""
    first, second = draw(model, True, random, mode="add"), draw(model, False, random, mode="scale")
    second.units[:, 0] = False
    for changes in ([first, second], [second, first]):
        edits = make_edits(model, [(change, [(1, 0), (3, 0)]) for change in changes])["z"]
        for layer in (0, 1):
            z = torch.randn(3, 4, model.shape.n_heads, model.shape.head_dim, generator=random)
            want = z
            for change in changes:
                want = by_hand(change, layer, want, (1, 3), 1)
            assert edits[layer](z) is z
            assert torch.equal(z, want)


def test_buffers_of_its_own(model, random):
    """What a graph replays: masks and values written to later count, those of the caller are left alone."""
    one, other = draw(model, True, random), draw(model, True, random)
    ready, new, before = Ready(model, one), Ready(model, other), one.values.clone()
    ready.own()
    ready.mask.copy_(new.mask)
    ready.values.copy_(new.values)
    z = torch.randn(3, 4, model.shape.n_heads, model.shape.head_dim, generator=random)
    want = by_hand(other, 1, z, (2,), 1)
    assert torch.equal(patch_units(ready, spans([(2, 0)], other), "replace", 1, z), want)
    assert torch.equal(one.values, before)


def test_spans(model, random):
    """Of values for all positions: the fewest there are. Of each position its own: as many as they stand in order."""
    for positions in ([], [3], [0, 1, 2, 5], [1, 3, 4, 9], list(range(7))):
        tokens = [(token, p) for p, token in enumerate(positions)]
        alike, own = (spans(tokens, draw(model, True, random, positions=n)) for n in (1, max(2, len(positions))))
        for found in (alike, own):
            assert [p for span, _ in found for p in range(span.start, span.stop)] == positions
            assert all(a.stop < b.start for (a, _), (b, _) in pairwise(found))
        assert all(at == slice(0, 1) for _, at in alike)
        assert [p for _, at in own for p in range(at.start, at.stop)] == list(range(len(positions)))
    found = spans([(0, 2), (1, 0), (2, 1), (3, 3)], draw(model, True, random, positions=4))
    assert found == [(slice(0, 1), slice(2, 3)), (slice(1, 3), slice(0, 2)), (slice(3, 4), slice(3, 4))]
