"""Variational Task Vector Composition (arXiv 2509.18208): for each sample, how much of each task vector of weights.

    h_b = feature of sample b under the frozen base theta_0
    each step, on a batch:
        c[b, t, block] ~ posterior(h_b)                              engine.methods.posterior: spike, slab and gate
        theta_b = theta_0 + sum_t c[b, t, block] tau_t               each sample with its own weights, in one forward
        AdamW on  mean_b loss(theta_b)  +  the terms of the posterior

`fit` also learns what the method is compared with: a posterior without its gate, without its variance, and one
coefficient for all samples (aTLAS, arXiv 2407.02880).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from engine import weights
from engine.artifacts import can_begin, load_tensors, save_tensors, versions
from engine.distributed import digest
from engine.methods.posterior import Constants, Kind, Posterior
from engine.progress import track
from engine.weights.parameters import Blocks, root_of
from engine.weights.reading import read_composition, read_inputs
from engine.weights.vectors import TaskVectors
from models import Model
from models.hooks import undisturbed
from models.reading import read_int, read_seed, read_tensor
from models.shapes import Float, Integer

__all__ = ["Constants", "Kind", "Posterior", "features_of", "fit"]

Loss = Callable[[Any, Tensor], Tensor]


@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    model: nn.Module | Model,
    vectors: TaskVectors,
    inputs: Any,
    loss: Loss,
    *,
    posterior: Kind = "gated",
    features: Float[Tensor, "samples features"] | np.ndarray | None = None,
    blocks: Blocks = "parameter",
    constants: Constants | None = None,
    epochs: Integer = 10,
    batch: Integer = 128,
    lr: float = 1e-2,
    weight_decay: float = 0.01,
    clip: float = math.inf,
    seed: Integer = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: Integer = 10,
    progress: bool = True,
) -> Posterior:
    """Learn the coefficients of task vectors from samples; the base and the vectors stay as they are.

    model:      the base. It runs as in eval(), whether it trains or not: draws of dropout could not be repeated when
                fitting goes on. vectors: of `engine.weights.task_vectors`.
    inputs:     of all samples: a tensor, or the model's arguments by name, each [samples, ...].
    loss:       a function of the model's output for a batch, and of these samples' places among all [batch]: a loss in
                nats for each of them, [batch], with gradients.
    posterior:  "gated" (default, the method); "spike_and_slab", "gaussian", "deterministic": the same networks with
                less of it; "shared": coefficients of all samples alike, from 0 (aTLAS; its authors: lr=1e-3,
                weight_decay=0.1, epochs=20, clip=1).
    features:   of all samples; default the base's own output for them, which must be [samples, numbers] then.
    blocks:     what shares a coefficient: "parameter" (default), "layer", "model".
    constants:  of the posterior, default `Constants()`.
    epochs, batch, lr, weight_decay: of AdamW; the rate falls to 0 by half a cosine, step by step.
    clip:       largest norm of a step's gradient; default none.
    checkpoint: a file, written every `checkpoint_every` steps; if it is there, fitting goes on from it, to the same
                bits as without the break (same machine and threads). It says what it is of: settings, inputs, features,
                vectors and the base's weights, all but the loss.

    Returns a `Posterior`, in the base's dtype, float32 at least: `posterior.coefficients(features)` go to
    `engine.weights.forward`. Raises ValueError or TypeError, before anything is computed, for what does not fit;
    ValueError for losses or gradients that are not finite, a loss of another shape, a checkpoint of something else;
    OSError if that cannot be written.

    Source: arXiv 2509.18208; what its abstract leaves open as in public code (`engine.methods.posterior` says which).

    >>> base, tuned = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> vectors, x, y = engine.weights.task_vectors(base, tuned), torch.randn(8, 2), torch.randint(3, (8,))
    >>> loss = lambda logits, at: torch.nn.functional.cross_entropy(logits, y[at], reduction="none")
    >>> posterior = engine.vtvc.fit(base, vectors, x, loss, epochs=1, progress=False)
    >>> engine.weights.forward(base, x, vectors, posterior.coefficients(engine.vtvc.features_of(base, x))).shape
    torch.Size([8, 3])
    """
    settings = _read_settings(
        posterior=posterior, epochs=epochs, batch=batch, lr=lr, weight_decay=weight_decay, clip=clip, seed=seed,
        constants=Constants() if constants is None else constants,
    )  # fmt: skip
    every = read_int(checkpoint_every, "checkpoint_every")
    if not callable(loss):
        raise TypeError(f"loss must be a function of outputs and the samples' places, got {type(loss).__name__}")
    zeros = torch.zeros(len(vectors), len(vectors.blocks(blocks))) if isinstance(vectors, TaskVectors) else None
    read_composition(model, vectors, zeros, blocks, batched=False)
    _check_recordable(root_of(model), vectors)
    # The posterior is float32 at least: in float16 AdamW's eps, 1e-8, is 0. The forward casts coefficients.
    samples, dtype = count(model, inputs), torch.promote_types(next(root_of(model).parameters()).dtype, torch.float32)
    h = features_of(model, inputs) if features is None else _read_features(features, samples)

    made = Posterior(
        posterior, vectors.names, tuple(vectors.blocks(blocks)), h.shape[1], settings["constants"], settings["seed"],
        dtype,
    ).to(h.device)  # fmt: skip
    identity = {k: v for k, v in settings.items() if k != "constants"} | asdict(settings["constants"])
    identity |= dict(names=list(vectors.names), of=blocks, samples=samples, base=vectors.base)
    if checkpoint is not None:
        # All of the base: a sample of it would miss what changes a few rows, and it is no more than one vector more.
        identity["data"] = digest(h, *_said(inputs))
        identity["weights"] = digest(*(x for pair in _weights_of(root_of(model)).items() for x in pair))
        identity["vectors"] = digest(*(vectors.whole(name) for name in vectors.shapes))
    adam = torch.optim.AdamW(made.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])
    losses = _resume(made, adam, checkpoint, identity) if checkpoint is not None else []
    a_pass, parts = -(-samples // settings["batch"]), [*root_of(model).modules()]
    steps = settings["epochs"] * a_pass
    for step in track(range(len(losses), steps), f"VTVC ({posterior}, {samples} samples)", progress):
        at = _order(samples, settings["seed"], step // a_pass)[(step % a_pass) * settings["batch"] :]
        at = at[: settings["batch"]].to(h.device)
        for group in adam.param_groups:
            group["lr"] = settings["lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        drawn = made.draw(h[at].to(dtype), _random(settings["seed"], step))
        with undisturbed(parts):
            outputs = weights.forward(model, rows(inputs, at), vectors, drawn.coefficients, blocks=blocks)
        own = loss(outputs, at)
        _check_losses(own, at, step)
        adam.zero_grad()
        (own.mean() + sum(drawn.terms.values())).backward()
        norm = torch.nn.utils.clip_grad_norm_(made.parameters(), settings["clip"])
        if not norm.isfinite():  # of a finite loss: what the model computes backward in float16 can overflow
            raise ValueError(f"the gradient is not finite at step {step}: a smaller loss or lr, or a wider dtype")
        adam.step()
        losses.append(own.mean().item())
        if checkpoint is not None and (len(losses) % every == 0 or len(losses) == steps):
            _save_state(made, adam, losses, checkpoint, identity)
    made.metadata = identity | {"method": "vtvc", "losses": losses, "versions": versions()}
    return made.eval()


@torch.no_grad()
def features_of(model: nn.Module | Model, inputs: Any, *, batch: Integer = 128) -> Float[Tensor, "samples features"]:
    """What the base itself gives for each sample, where that is [samples, numbers]: an encoder's pooled output, say.

    The base runs as in eval(), whether it trains or not, so that every call gives the same.

    Raises ValueError for a model that gives something else: take its features by hand then.

    >>> engine.vtvc.features_of(torch.nn.Linear(2, 3), torch.randn(8, 2)).shape
    torch.Size([8, 3])
    """
    found = []
    for at in torch.arange(count(model, inputs)).split(read_int(batch, "batch")):
        args, named = read_inputs(model, rows(inputs, at), len(at))
        with undisturbed([*root_of(model).modules()]):
            answer = root_of(model)(*args, **named)
        if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(at):
            got = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(f"features are the base's output [samples, numbers], it gives {got}: give features=")
        found.append(answer)
    return _read_features(torch.cat(found), sum(map(len, found)))


def count(model: nn.Module | Model, inputs: Any) -> int:
    """Samples among inputs. Raises TypeError or ValueError for inputs that are none, or of several lengths."""
    given = inputs if isinstance(inputs, Mapping) else {"inputs": read_tensor(inputs, "inputs")}
    lengths = {name: len(x) for name, x in given.items() if isinstance(x, Tensor) and x.ndim}
    if not lengths or not all(lengths.values()) or len(set(lengths.values())) > 1:
        said = lengths or f"{type(inputs).__name__} without tensors"
        raise ValueError(f"inputs must be tensors [samples, ...] of one number of samples, 1 at least: got {said}")
    samples = next(iter(lengths.values()))
    read_inputs(model, inputs, samples)
    return samples


def rows(inputs: Any, at: Tensor) -> Any:
    """Some of the samples."""
    if isinstance(inputs, Mapping):
        return {name: x[at] if isinstance(x, Tensor) else x for name, x in inputs.items()}
    return read_tensor(inputs, "inputs")[at]


def _read_settings(**given: Any) -> dict[str, Any]:
    read: dict[str, Any] = {name: read_int(given[name], name) for name in ("epochs", "batch")}
    if given["posterior"] not in get_args(Kind):
        raise ValueError(f"posterior must be one of {get_args(Kind)}, got {given['posterior']!r}")
    for name, least in (("lr", 0.0), ("weight_decay", -1e-300), ("clip", 0.0)):
        x = given[name]
        if isinstance(x, bool) or not isinstance(x, Real) or not float(x) > least or (x == math.inf and name != "clip"):
            raise ValueError(f"expected {name} {'>= 0' if name == 'weight_decay' else '> 0'}, a number, got {x!r:.80}")
        read[name] = float(x)
    constants = given["constants"]
    if not isinstance(constants, Constants):
        raise TypeError(f"constants must be engine.vtvc.Constants, got {type(constants).__name__}")
    for field in fields(Constants):
        x = getattr(constants, field.name)
        positive = field.name in ("psi1", "psi2", "rho", "temperature", "width")
        if isinstance(x, bool) or not isinstance(x, Real) or not math.isfinite(x) or (positive and not float(x) > 0):
            raise ValueError(f"constants: expected {field.name} {'> 0' if positive else 'finite'}, got {x!r:.80}")
    if not 0 < constants.pi < 1:
        raise ValueError(f"constants: expected pi, a probability between 0 and 1, got {constants.pi!r}")
    return read | {"posterior": given["posterior"], "seed": read_seed(given["seed"]), "constants": constants}


def _read_features(given: Any, samples: int) -> Float[Tensor, "samples features"]:
    h = read_tensor(given, "features")
    if not isinstance(h, Tensor) or not h.is_floating_point() or h.ndim != 2 or len(h) != samples or not h.numel():
        got = f"{h.dtype} {list(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
        raise ValueError(f"features must be floating-point numbers [{samples} samples, numbers], got {got}")
    if not h.isfinite().all():
        raise ValueError(f"features must be finite: row {(~h.isfinite()).nonzero()[0, 0].item()} is not")
    return h.detach()


def _weights_of(base: nn.Module) -> dict[str, Tensor]:
    """What a file of the base would hold: without the tables that forwards grow, which change from call to call."""
    return {name: x for name, x in base.state_dict().items() if isinstance(x, Tensor)}


def _said(inputs: Any) -> Iterator[Any]:
    """Inputs, part by part, for a digest; of what is neither numbers nor text its type: no address recurs."""
    for name, given in sorted(inputs.items()) if isinstance(inputs, Mapping) else [("inputs", inputs)]:
        yield name
        for leaf in map(lambda x: read_tensor(x, name), tree_leaves(given)):
            yield leaf if isinstance(leaf, Tensor | int | float | str | None) else type(leaf).__name__


def _check_recordable(base: nn.Module, vectors: TaskVectors) -> None:
    """Autograd keeps no tensor of inference mode. Batches of samples are copies; these would be doubled."""
    added = [*vectors.tensors.values(), *(x for pair in vectors.factors.values() for x in pair)]
    for what, tensors in (("base", _weights_of(base).values()), ("vectors", added)):
        if any(x.is_inference() for x in tensors):
            raise ValueError(
                f"the {what} came from within torch.inference_mode(), where no gradients are recorded: expected {what} "
                "made outside it, or under torch.no_grad()"
            )


def _order(samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(samples, generator=_random(seed, epoch))


def _random(seed: int, at: int) -> Generator:
    """Of a step, or of an epoch's order. Modulo 2**64, as torch itself takes negative seeds; it refuses larger ones."""
    return Generator().manual_seed((seed * 1_000_003 + at) % 2**64)


def _check_losses(own: Any, at: Tensor, step: int) -> None:
    if not isinstance(own, Tensor) or list(own.shape) != [len(at)] or not own.is_floating_point():
        got = f"{own.dtype} {list(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
        raise ValueError(f"loss must give one number a sample, [{len(at)}], got {got}")
    if not own.requires_grad:
        raise ValueError("loss must have gradients, got one without: the loss or the model's forward detaches it")
    if not own.isfinite().all():
        bad = at[(~own.isfinite()).to(at.device)][0].item()
        raise ValueError(f"the loss of sample {bad} is not finite at step {step}: a smaller lr, or look at that sample")


def _save_state(made: Posterior, adam: Any, losses: list[float], path: str | Path, identity: dict[str, Any]) -> None:
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, p in made.named_parameters():
        state = adam.state[p]
        tensors |= {name: p, f"{name}:exp_avg": state["exp_avg"], f"{name}:exp_avg_sq": state["exp_avg_sq"]}
    save_tensors(path, tensors, identity)


def _resume(made: Posterior, adam: Any, path: str | Path, identity: dict[str, Any]) -> list[float]:
    """The losses so far; parameters and moments as they were after them."""
    if can_begin(path):
        return []
    names = [name for name, _ in made.named_parameters()]
    wanted = [f"{name}{what}" for name in names for what in ("", ":exp_avg", ":exp_avg_sq")]
    _, saved = load_tensors(path, ())
    if differing := sorted(key for key in identity if saved.get(key) != identity[key]):
        was, now = ({key: one.get(key) for key in differing} for one in (saved, identity))
        raise ValueError(f"checkpoint {path} is of something else: it has {was}, expected {now}")
    tensors, _ = load_tensors(path, ("losses", *wanted))
    step = torch.tensor(float(len(tensors["losses"])))
    for name, p in made.named_parameters():
        with torch.no_grad():
            p.copy_(tensors[name])
        moments = {what: tensors[f"{name}:{what}"].to(p.device) for what in ("exp_avg", "exp_avg_sq")}
        adam.state[p] = {"step": step.clone(), **moments}
    losses: list[float] = tensors["losses"].tolist()
    return losses
