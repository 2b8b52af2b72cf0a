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
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from engine.core.checking import able
from engine.core.prefix import Prefix, compute, shareable
from engine.core.runner import segments
from engine.tasks.scoring import cross_entropies, with_answer
from models import Edits, Model, UnsupportedModelError
from models.shapes import Float

Estimator: TypeAlias = Literal["reinforce", "leave_one_out", "straight_through", "relaxed"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
BY_GATES = ESTIMATORS[2:]


def leave_one_out(losses: Float[Tensor, " rollouts"]) -> Float[Tensor, " rollouts"]:
    """Each loss less the mean of the others."""
    return losses - (losses.sum() - losses) / (len(losses) - 1)


def standardised(log_p: Float[Tensor, " rollouts"], losses: Float[Tensor, " rollouts"]) -> Float[Tensor, ""]:
    """REINFORCE's objective, the advantage being how far a loss is from the mean, in standard deviations."""
    return (log_p * (losses - losses.mean()) / (losses.std() + 1e-3)).sum()


def gated(
    model: Model, gates: Float[Tensor, "rows layers heads"], means: Float[Tensor, "layers heads head_dim"], at: int = -1
) -> Edits:
    """Z + g (mean - z) for z, at one token of each row: exactly z where g is 0, exactly the mean where it is 1."""
    gates = model.own_heads(gates.to(model.device), -1)[:, None, :, :, None]  # [rows, 1, L, H, 1]
    means = model.own_heads(means.to(model.device), -2)

    def gate(layer: int, z: Tensor) -> Tensor:
        # A copy: a backend writes to z, and the backward pass reads what it was.
        token, new = z.shape[1] + at, means[layer][:, : z.shape[-1]].to(z)
        one = z[:, token : token + 1].clone().lerp(new, gates[:, :, layer].to(z))
        return torch.cat([z[:, :token], one, z[:, token + 1 :]], dim=1)

    return {"z": {layer: partial(gate, layer) for layer in range(model.shape.n_layers)}}


def gated_logits(
    model: Model,
    prompts: Sequence[Prefix],
    gates: Float[Tensor, "prompts rollouts layers heads"],
    means: Float[Tensor, "layers heads head_dim"],
) -> Float[Tensor, "prompts rollouts *places vocab"]:
    """Gated at each prompt's token `-places`, read from there on; differentiable in the gates.

    Prefixes are as they were computed, without a graph.
    """
    found = able(model, prompts)
    rollouts, places = gates.shape[1], prompts[0].places
    if not any(can.why_not("packed", len(prompt.tokens)) for can, prompt in zip(found, prompts, strict=True)):
        packed = segments(prompts, [len(prompt.tokens) - places for prompt in prompts], rollouts)
        return model.pack(packed, gated(model, gates.flatten(0, 1), means, -places), logits=places).logits
    logits = []
    for prompt, rows in zip(prompts, gates, strict=True):
        split = shareable(prompt, len(prompt.tokens) - places)
        prompt = compute([prompt], [split])[0]
        ids = prompt.tokens[split:].expand(rollouts, -1)
        prefix, inputs = (prompt.cache[:split], None) if split else (None, prompt.prompt.inputs)
        logits.append(model.forward(ids, gated(model, rows, means, -places), prefix, inputs, logits=places))
    return torch.stack(logits)


def gate_gradients(
    model: Model,
    prompts: Sequence[Prefix],
    targets: Sequence[Sequence[int]],
    gates: Float[Tensor, "prompts rollouts layers heads"],
    means: Float[Tensor, "layers heads head_dim"],
    mean: bool = False,
) -> tuple[Float[Tensor, "prompts rollouts"], Float[Tensor, "prompts rollouts layers heads"]]:
    """Cross-entropy of each answer, in nats, and its gradient with respect to each gate; on the CPU, in float32.

    prompts: computed up to their last token (`PrefixPool`), unless the model cannot share that. mean: over tokens.

    Raises UnsupportedModelError for a model that records no gradients. Those of the weights are neither made nor
    changed, whether they require them or not.
    """
    with torch.inference_mode(False), torch.enable_grad():
        losses, gradients = gates.new_empty(gates.shape[:2]), torch.empty_like(gates)
        for n in sorted({len(answer) for answer in targets}):  # those of one length share a forward
            alike = [i for i, answer in enumerate(targets) if len(answer) == n]
            some = gates[alike].detach().clone().requires_grad_()
            grown = [with_answer(model, prompts[i], targets[i]) for i in alike]
            logits = gated_logits(model, grown, some, means)
            if not logits.requires_grad:
                raise UnsupportedModelError(
                    f"{model.name} records no gradients: search by estimator='reinforce' or 'leave_one_out'"
                )
            loss = cross_entropies(logits, [targets[i] for i in alike], mean)
            losses[alike] = loss.detach().to(losses)
            gradients[alike] = torch.autograd.grad(loss.sum(), some)[0].to(gradients)
    return losses.detach().float().cpu(), gradients.float().cpu()
