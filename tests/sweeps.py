"""What tests of sweeps of heads share: the loop of naive forwards."""

import torch

import engine
from engine import groups
from engine.questions.metrics import read_metric

LIMIT = 1e-5
PROMPTS = ["Q: hot\nA:", "Q: big\nA: small\n\nQ: old\nA:", "up"]
TARGETS, OTHERS = [5, 17, 96], [7, 0, 3]


def options(**more):
    return dict(targets=TARGETS, others=OTHERS, progress=False) | more


def loop(model, prompts, masks, values, metric="probability", position=-1, mode="replace", targets=None):
    """Clean [N] and patched [N, U]: one hooked forward for each. values: one set a prompt."""
    targets, others = targets or TARGETS[: len(prompts)], OTHERS[: len(prompts)]
    score = read_metric(metric, targets, others, prompts=len(prompts), vocab_size=model.shape.vocab_size)
    clean, patched = [], []
    for prompt, target, other, new in zip(prompts, targets, others, values, strict=True):
        unpatched = engine.naive.patch(model, prompt, heads=None, values=None)
        run = dict(values=new, positions=position, mode=mode)
        logits = torch.cat([engine.naive.patch(model, prompt, heads=mask, **run) for mask in masks])
        clean.append(score(unpatched, target, other, unpatched[0]))
        patched.append(score(logits, target, other, unpatched[0]))
    return torch.cat(clean).double(), torch.stack(patched).double()


def each_layer(model):
    return torch.stack(list(groups.layers(model).values()))


def each_head(model):
    shape = model.shape
    return torch.eye(shape.n_layers * shape.n_heads, dtype=torch.bool).unflatten(1, (shape.n_layers, shape.n_heads))


def agrees(effects, clean, patched, limit=LIMIT):
    assert effects.patched.dtype == effects.clean.dtype == torch.float64
    torch.testing.assert_close(effects.clean, clean, atol=limit, rtol=0)
    torch.testing.assert_close(effects.patched, patched.view(effects.patched.shape), atol=limit, rtol=0)
    assert (effects.effect.abs() > 10 * limit).any()  # there is something to agree on
