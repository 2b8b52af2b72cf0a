"""Which way theta goes: four estimates of the gradient of E[L(lambda)], lambda ~ Bernoulli(p), with respect to p.

By rollouts, from their losses alone: the sum over k of A_k grad log p(lambda_k)
    reinforce         A_k = L_k, or (L_k - mean L) / (std L + 1e-3): as the preset says
    leave_one_out     A_k = L_k - mean of the other rollouts' L    (Buy 4 REINFORCE Samples, Kool et al. 2019)
By gates, one backward pass through the edit z := z + g (mean - z):  dL/dg, at
    straight_through  g = lambda, with dg/dp := 1    (arXiv 1308.3432)
    relaxed           g = p
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.checking import able
from engine.prefix import Prefix, compute, shareable
from engine.runner import segments
from models import Edit, Model, UnsupportedModelError
from models.shapes import Float

Estimator: TypeAlias = Literal["reinforce", "leave_one_out", "straight_through", "relaxed"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
BY_GATES = ESTIMATORS[2:]


def leave_one_out(losses: Float[Tensor, " rollouts"]) -> Float[Tensor, " rollouts"]:
    """Each loss less the mean of the others."""
    return losses - (losses.sum() - losses) / (len(losses) - 1)


def gated(
    model: Model, gates: Float[Tensor, "rows layers heads"], means: Float[Tensor, "layers heads head_dim"]
) -> Edit:
    """The edit z + g (mean - z) at each row's last token: exactly z where g is 0, exactly the mean where it is 1."""
    gates = model.own_heads(gates.to(model.device), -1)[:, None, :, :, None]  # [rows, 1, L, H, 1]
    means = model.own_heads(means.to(model.device), -2)

    def edit(layer: int, z: Tensor) -> Tensor:
        # A copy: a backend writes to z, and the backward pass reads what it was.
        last = z[:, -1:].clone().lerp(means[layer][:, : z.shape[-1]].to(z), gates[:, :, layer].to(z))
        return torch.cat([z[:, :-1], last], dim=1)

    return edit


def gated_logits(
    model: Model,
    prompts: Sequence[Prefix],
    gates: Float[Tensor, "prompts rollouts layers heads"],
    means: Float[Tensor, "layers heads head_dim"],
) -> Float[Tensor, "prompts rollouts vocab"]:
    """Of the last token; differentiable in the gates. Prefixes are as they were computed, without a graph."""
    found = able(model, prompts)
    rollouts = gates.shape[1]
    if not any(can.why_not("packed", len(prompt.tokens)) for can, prompt in zip(found, prompts, strict=True)):
        packed = segments(prompts, [len(prompt.tokens) - 1 for prompt in prompts], rollouts)
        return model.pack(packed, gated(model, gates.flatten(0, 1), means)).logits
    logits = []
    for prompt, rows in zip(prompts, gates, strict=True):
        split = shareable(prompt, len(prompt.tokens) - 1)
        prompt = compute([prompt], [split])[0]
        ids = prompt.tokens[split:].expand(rollouts, -1)
        prefix, inputs = (prompt.cache[:split], None) if split else (None, prompt.prompt.inputs)
        logits.append(model.forward(ids, gated(model, rows, means), prefix, inputs))
    return torch.stack(logits)


def gate_gradients(
    model: Model,
    prompts: Sequence[Prefix],
    targets: Sequence[int],
    gates: Float[Tensor, "prompts rollouts layers heads"],
    means: Float[Tensor, "layers heads head_dim"],
) -> tuple[Float[Tensor, "prompts rollouts"], Float[Tensor, "prompts rollouts layers heads"]]:
    """Cross-entropy of each target, in nats, and its gradient with respect to each gate; on the CPU, in float32.

    prompts: computed up to their last token (`PrefixPool`), unless the model cannot share that.

    Raises UnsupportedModelError for a model that records no gradients. Those of the weights are neither made nor
    changed, whether they require them or not.
    """
    with torch.inference_mode(False), torch.enable_grad():
        gates = gates.detach().clone().requires_grad_()
        logits = gated_logits(model, prompts, gates, means).float()
        if not logits.requires_grad:
            raise UnsupportedModelError(
                f"{model.name} records no gradients: search by estimator='reinforce' or 'leave_one_out'"
            )
        target = torch.tensor(targets, device=logits.device).repeat_interleave(gates.shape[1])
        losses = cross_entropy(logits.flatten(0, 1), target, reduction="none").view(gates.shape[:2])
        gradients = torch.autograd.grad(losses.sum(), gates)[0]
    return losses.detach().cpu(), gradients.float().cpu()
