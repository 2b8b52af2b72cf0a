"""An edit may write to z and return it, or return a new tensor: every backend uses what is returned, and hands over a z
that may be written to. `make_edit` writes to it unless gradients are recorded.
"""

from itertools import pairwise

import pytest
import torch

import models
from engine.core.patches import Patch
from engine.core.runner import contiguous, make_edit
from models import lens, nnsight_backend, zoo
from models.calls import Passing
from models.hooks import edit_z
from models.layout import Rows

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


def passes(model):
    """A forward, and packed sequences: with a context computed in them, with one at hand, with a single row."""
    with torch.no_grad():
        context = model.prefill([models.interface.Encoded(IDS)], [len(IDS)])[0]
    return {
        "forward": lambda edit: model.forward(ROWS, edit),
        "expanded": lambda edit: model.forward(ROWS, edit, context),
        "fresh": lambda edit: model.pack([models.Segment(IDS, ROWS)], edit).logits[0],
        "reused": lambda edit: model.pack([models.Segment(context, ROWS)], edit).logits[0],
        "one row": lambda edit: model.pack([models.Segment(context, ROWS[:1])], edit).logits[0],
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
        model.forward(ROWS, write)
        handle.remove()
        with bridged.bridge.hooks(fwd_hooks=[(bridged._hooks[1], lambda z, hook: hold(z))]):
            bridged.forward(ROWS, write)
            bridged.pack([models.Segment(IDS, ROWS)], write)
    assert len(held) == 3
    assert all(torch.equal(x, before) for x, before in held)


@pytest.mark.parametrize("first", [0, 7])
def test_packed_rows_are_edited_where_they_lie(model, first):
    """In a sequence of any strides; what stands before them is left alone."""
    width = model.shape.n_heads * model.shape.head_dim
    for x in (torch.randn(1, first + 6, width), torch.randn(width, first + 6).T[None]):
        before = x.clone()
        assert edit_z(write, 0, x, model.shape.head_dim, Rows(first, 2)) is x
        rows = replace(0, before[0, first:].reshape(3, 2, model.shape.n_heads, -1))
        assert torch.equal(x[:, :first], before[:, :first])
        assert torch.equal(x[0, first:].reshape(rows.shape), rows)


def draw(model, per_row, random, rows=3, mode="replace"):
    s = model.shape
    heads = torch.rand(rows, s.n_layers, s.n_heads, generator=random) < 0.5
    heads[:, 2] = False
    values = torch.randn(*[rows][: int(per_row)], s.n_layers, s.n_heads, s.head_dim, generator=random)
    return Patch(heads, values, (-1,), mode)


def by_hand(patch, layer, z, tail, n_prompts):
    z = z.clone()
    for row in range(n_prompts * patch.n_rows):
        r = row % patch.n_rows
        for h in patch.heads[r, layer].nonzero()[:, 0].tolist():
            value = (patch.values[r] if patch.values.ndim == 4 else patch.values)[layer, h]
            for t in tail:
                z[row, t, h] = z[row, t, h] + value if patch.mode == "add" else value
    return z


@pytest.mark.parametrize("tail", [(0,), (3,), (0, 1, 2, 3), (0, 2), (1, 2), (0, 1, 3)])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize(("n_prompts", "mode"), [(1, "replace"), (2, "add")])
def test_make_edit_writes_to_z(model, random, tail, per_row, n_prompts, mode):
    patch = draw(model, per_row, random, mode=mode)
    edit = make_edit(model, patch, tail, 4, n_prompts)
    recorded = make_edit(
        model, Patch(patch.heads, patch.values.clone().requires_grad_(), (-1,), mode), tail, 4, n_prompts
    )
    for layer in range(3):
        z = torch.randn(3 * n_prompts, 4, model.shape.n_heads, model.shape.head_dim, generator=random)
        want, before = by_hand(patch, layer, z, tail, n_prompts), z.clone()
        assert torch.equal(recorded(layer, z), want)
        assert torch.equal(z, before)
        assert edit(layer, z) is z
        assert torch.equal(z, want)


def test_gradients_through_several_spans(model, random):
    patch = draw(model, True, random)
    values = patch.values.clone().requires_grad_()
    z = torch.randn(3, 4, model.shape.n_heads, model.shape.head_dim, generator=random, requires_grad=True)
    edited = make_edit(model, Patch(patch.heads, values, (-1,), "replace"), (0, 1, 3), 4)(0, z)
    edited.sum().backward()
    on = patch.heads[:, 0, :, None].expand(3, model.shape.n_heads, model.shape.head_dim)
    assert torch.equal(values.grad[:, 0], 3.0 * on)
    assert torch.equal(z.grad[:, 2], torch.ones_like(on, dtype=torch.float32))
    assert all(torch.equal(z.grad[:, t], 1.0 * ~on) for t in (0, 1, 3))


def test_masks_and_values_follow_z(model, random):
    """To the device and the dtype of the layer it comes from. The other device, where there is none, is "meta"."""
    patch = draw(model, False, random)
    edit = make_edit(model, patch, (0, 2), 4)
    z = torch.randn(3, 4, model.shape.n_heads, model.shape.head_dim, generator=random)
    for layer in (0, 1):
        away = z.to("meta")
        assert edit(layer, away) is away
        assert torch.equal(edit(layer, z.double()), by_hand(patch, layer, z.double(), (0, 2), 1))
        assert torch.equal(edit(layer, z.clone()), by_hand(patch, layer, z, (0, 2), 1))


def test_contiguous():
    for positions in ([], [3], [0, 1, 2, 5], [1, 3, 4, 9], list(range(7))):
        spans = contiguous(positions)
        assert [p for span in spans for p in range(span.start, span.stop)] == positions
        assert all(a.stop < b.start for a, b in pairwise(spans))
