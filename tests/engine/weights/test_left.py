"""Models are left as they were, whatever happens in a call."""

import pytest
import torch

from engine import weights
from tests.engine.weights.networks import NETWORKS, Attention, draw, setting

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:.*weight_norm.*:FutureWarning")


def state(model):
    """Everything that a call could leave behind."""

    def ids(given):
        return {key: id(x) for key, x in given.items()}

    return [
        (
            type(part), ids(part._parameters), ids(part._buffers), ids(part._modules), part.training,
            {key: type(x) for key, x in vars(part).items()}, len(part._forward_hooks), len(part._forward_pre_hooks),
            [id(x) for x in getattr(part, "_flat_weights", ())], "forward" in vars(part),
        )
        for part in model.modules()
    ]  # fmt: skip


def values(model):
    return {key: (x.detach().clone(), x.requires_grad, x.grad) for key, x in model.named_parameters()}


def unchanged(model, before, numbers):
    assert state(model) == before
    for key, x in model.named_parameters():
        assert torch.equal(x, numbers[key][0])
        assert (x.requires_grad, x.grad) == numbers[key][1:]


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_after_a_call(kind, training):
    base, tuned, inputs = setting(kind)
    base(inputs)
    for part in base.modules():
        part.training = training and not isinstance(part, torch.nn.BatchNorm2d)
    vectors = weights.task_vectors(base, *tuned)
    before, numbers = state(base), values(base)
    for c in (draw(vectors), draw(vectors).requires_grad_(), draw(vectors)[0], draw(vectors)[0].requires_grad_()):
        weights.forward(base, inputs, vectors, c)
        unchanged(base, before, numbers)


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
def test_after_an_error_anywhere(kind):
    """In what is looked at, in the oracle, in the run itself."""
    base, tuned, inputs = setting(kind)
    vectors = weights.task_vectors(base, *tuned)
    last = [part for part in base.modules() if not list(part.children())][-1]
    counted, stop_at = [0], [10**9]

    def count(*_):
        counted[0] += 1
        if counted[0] > stop_at[0]:
            raise Stop

    last.register_forward_pre_hook(count)
    base(inputs)
    before, numbers = state(base), values(base)
    weights.forward(base, inputs, vectors, draw(vectors))
    for at in (0, 1, 2, 3, 4, counted[0] - 2):
        from engine.weights import looking

        looking._known.pop(base, None)
        counted[0], stop_at[0] = 0, at
        with pytest.raises(Stop):
            weights.forward(base, inputs, vectors, draw(vectors))
        unchanged(base, before, numbers)
    counted[0], stop_at[0] = 0, 0
    with pytest.raises(Stop), weights.merged(base, vectors, draw(vectors)[0]):
        base(inputs)
    unchanged(base, before, numbers)


def test_a_forward_of_others_stays():
    base, tuned, inputs = setting(Attention)
    vectors = weights.task_vectors(base, *tuned)
    attention = base.encoder.layers[0].self_attn
    theirs, ran = attention.forward, []
    attention.forward = lambda *args, **kwargs: ran.append(1) or theirs(*args, **kwargs)
    own = attention.forward
    weights.forward(base, inputs, vectors, draw(vectors))
    assert attention.forward is own
    assert ran


def test_the_draws_of_others_are_not_disturbed():
    base, tuned, inputs = setting(Attention)
    vectors = weights.task_vectors(base, *tuned)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    weights.forward(base, inputs, vectors, draw(vectors))
    assert torch.equal(torch.rand(3), want)
