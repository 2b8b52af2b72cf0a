"""The gated posterior of Variational Task Vector Composition (arXiv 2509.18208): its formulas, and those beside it.

A frozen feature h of a sample says, for each task vector and block, a normal distribution N(mu, sigma^2):

    u = tanh(sigma / |mu|)                                     how uncertain a coefficient is
    t = psi1 (1 + psi2 u)                                      the threshold it must pass
    z = mu + sigma eps;  c = z g,  g = sigmoid(rho (|z| - t))  in training
    c = mu 1[|mu| >= t]                                        after it: exact zeros
    q = P(|z| >= t) = 1 - Phi((t - mu) / sigma) + Phi((-t - mu) / sigma)

and what is lowered in training is the loss of the composed model, plus

    kl          (KL(Bern(q) || Bern(pi)) + q KL(N(mu, sigma^2) || N(0, 1)))   spike and slab
    boundary    (1 - ||mu| - t| / m)_+                         coefficients that stay at their threshold
    exploration -ln |psi1 - psi1_0| - ln |psi2 - psi2_0|       thresholds that stay where they began
    uncertainty g u                                            uncertain coefficients that pass

each the mean over samples, vectors and blocks. Sources of what the paper's abstract does not say: its listing of
reproducibility variables (m, rho, psi, the weights), and public code of one of its authors (the networks, u, the prior,
the shape of the boundary term). The exact q in place of a further network is ours: it is the probability that the gate
of the sampled z is open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor, nn

from engine.artifacts import load_tensors, save_tensors
from models.reading import read_tensor
from models.shapes import Bool, Float

# gated: the method. spike_and_slab: a network says q, a relaxed Bernoulli multiplies z. gaussian: c = z.
# deterministic: c = mu. shared: one c for all samples (aTLAS, arXiv 2407.02880).
Kind: TypeAlias = Literal["gated", "spike_and_slab", "gaussian", "deterministic", "shared"]

TINY = 1e-30


@dataclass(frozen=True)
class Constants:
    """Of the posterior; the defaults are the source's where it says them.

    psi1, psi2:   thresholds at the start, for a certain coefficient, and its growth with uncertainty; learned.
    rho:          slope of the gate in training.
    pi:           prior probability that a coefficient is not zero (public code).
    temperature:  of the relaxed Bernoulli, "spike_and_slab" only (public code).
    boundary, exploration, uncertainty, kl: weights of the terms. kl: 0.1 is public code's; the source lists a "global"
                  1e-3 whose place in the sum is not known: it may be this one.
    width:        m, of the boundary term.
    mean, log_variance: where the networks' last biases begin; ours. Public code begins at 0 and 0, where sigma is 1 and
                  composition is noise.
    """

    psi1: float = 0.05
    psi2: float = 1.0
    rho: float = 20.0
    pi: float = 0.5
    temperature: float = 0.1
    kl: float = 0.1
    boundary: float = 1e-4
    exploration: float = 1e-3
    uncertainty: float = 1e-2
    width: float = 0.1
    mean: float = 0.15
    log_variance: float = -4.0


class Drawn(NamedTuple):
    """Coefficients of a training step and the terms beside the loss, each with its weight."""

    coefficients: Float[Tensor, "*batch vectors blocks"]
    terms: Mapping[str, Float[Tensor, ""]]


def uncertainty(mu: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return torch.tanh(sigma / (mu.abs() + 1e-8))


def gate(z: Float[Tensor, "..."], t: Float[Tensor, "..."], rho: float) -> Float[Tensor, "..."]:
    return torch.sigmoid(rho * (z.abs() - t))


def opened(mu: Float[Tensor, "..."], sigma: Float[Tensor, "..."], t: Float[Tensor, "..."]) -> tuple[Tensor, Tensor]:
    """Q = P(|z| >= t), and 1 - q by itself: near 1, a difference would be rounding."""
    high, low = torch.special.ndtr((mu - t) / sigma), torch.special.ndtr((-t - mu) / sigma)
    return high + low, (torch.special.ndtr((t - mu) / sigma) - low).clamp_min(0)


def kl_bernoulli(q: Float[Tensor, "..."], rest: Float[Tensor, "..."], pi: float) -> Float[Tensor, "..."]:
    """KL(Bern(q) || Bern(pi)). rest: 1 - q."""
    on = torch.xlogy(q, q.clamp_min(TINY)) - q * math.log(pi)
    return on + torch.xlogy(rest, rest.clamp_min(TINY)) - rest * math.log(1 - pi)


def kl_normal(mu: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """KL(N(mu, sigma^2) || N(0, 1))."""
    return 0.5 * (sigma**2 + mu**2 - 1) - sigma.log()


class Posterior(nn.Module):
    """Coefficients of task vectors for a sample, from a feature of it: what `engine.vtvc.fit` returns, fitted.

    kind:      which posterior. names, blocks: of the vectors and of what has a coefficient, in the order of both.
    features:  numbers a feature has.
    constants: of the method.
    metadata:  what it was fitted on, and its losses.
    """

    def __init__(
        self,
        kind: Kind,
        names: tuple[str, ...],
        blocks: tuple[str, ...],
        features: int,
        constants: Constants,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.kind, self.names, self.blocks, self.features = kind, names, blocks, features
        self.constants, self.metadata = constants, dict[str, Any]()
        out, random = len(names) * len(blocks), Generator().manual_seed(seed)
        if kind == "shared":
            self.shared = nn.Parameter(torch.zeros(len(names), len(blocks), dtype=dtype))
            return
        self.mean = _network(features, out, constants.mean, random, dtype)
        if kind != "deterministic":
            self.log_variance = _network(features, out, constants.log_variance, random, dtype)
        if kind == "spike_and_slab":
            self.logit = _network(features, out, 0.0, random, dtype)
        if kind == "gated":
            self.log_psi = nn.Parameter(torch.tensor([constants.psi1, constants.psi2], dtype=dtype).log())

    def coefficients(
        self, features: Float[Tensor, "batch features"] | np.ndarray
    ) -> Float[Tensor, "batch vectors blocks"]:
        """Of each sample, after training: the mean, where the gate is open, else exactly 0.

        features: as `engine.vtvc.fit` takes them, in any floating-point dtype; computed in that of the posterior.

        Raises ValueError for features of another size, or that are no floating-point numbers.

        >>> vectors = engine.weights.task_vectors(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3))
        >>> posterior = engine.vtvc.Posterior("gated", vectors.names, ("weight", "bias"), 3, engine.vtvc.Constants())
        >>> posterior.coefficients(torch.rand(4, 3)).shape
        torch.Size([4, 1, 2])
        """
        h = read_tensor(features, "features")
        if not isinstance(h, Tensor) or not h.is_floating_point() or h.ndim != 2 or h.shape[1] != self.features:
            got = f"{h.dtype} {list(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(f"expected features, floating-point numbers [batch, {self.features}], got {got}")
        with torch.no_grad():
            if self.kind == "shared":
                return self.shared.expand(len(h), -1, -1).clone()
            h = h.to(next(self.parameters()))
            mu = self._of(self.mean, h)
            if self.kind == "spike_and_slab":
                return mu * (self._of(self.logit, h) >= 0)
            return mu * self._passes(mu, self._sigma(h)) if self.kind == "gated" else mu

    def draw(self, features: Float[Tensor, "batch features"], random: Generator) -> Drawn:
        """For a training step, with gradients; of a shared one [vectors, blocks]."""
        if self.kind == "shared":
            return Drawn(self.shared, {})
        mu, k = self._of(self.mean, features), self.constants
        if self.kind == "deterministic":
            return Drawn(mu, {})
        sigma = self._sigma(features)
        z = mu + sigma * torch.randn(mu.shape, generator=random, dtype=mu.dtype).to(mu.device)
        slab = kl_normal(mu, sigma)
        if self.kind == "gaussian":
            return Drawn(z, {"kl": k.kl * slab.mean()})
        if self.kind == "spike_and_slab":
            logit = self._of(self.logit, features)
            noise = torch.rand(mu.shape, generator=random, dtype=mu.dtype).clamp(1e-6, 1 - 1e-6).logit().to(mu.device)
            included = torch.sigmoid((logit + noise) / k.temperature)
            q = logit.sigmoid()
            kl = kl_bernoulli(q, (-logit).sigmoid(), k.pi) + q * slab
            return Drawn(z * included, {"kl": k.kl * kl.mean()})
        u = uncertainty(mu, sigma)
        t = self._threshold(u)
        g = gate(z, t, k.rho)
        q, rest = opened(mu, sigma, t)
        moved = (self.log_psi.exp() - mu.new_tensor([k.psi1, k.psi2])).abs()
        terms = {
            "kl_gate": k.kl * kl_bernoulli(q, rest, k.pi).mean(),
            "kl_slab": k.kl * (q * slab).mean(),
            "boundary": k.boundary * (1 - (mu.abs() - t).abs() / k.width).clamp_min(0).mean(),
            "exploration": -k.exploration * moved.clamp_min(1e-5).log().sum(),
            "uncertainty": k.uncertainty * (g * u).mean(),
        }
        return Drawn(z * g, terms)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, whole or not at all. Raises OSError if it cannot be written."""
        said: dict[str, Any] = dict(kind=self.kind, names=self.names, blocks=self.blocks, features=self.features)
        said |= dict(constants=asdict(self.constants), fitted=self.metadata)
        save_tensors(path, self.state_dict(), {"posterior": said})

    @classmethod
    def load(cls, path: str | Path) -> Posterior:
        """Read a saved one. Raises FileNotFoundError, or ValueError for a file that is broken or something else.

        >>> made = engine.vtvc.Posterior("gated", ("a",), ("weight", "bias"), 3, engine.vtvc.Constants())
        >>> made.save("posterior.safetensors")
        >>> engine.vtvc.Posterior.load("posterior.safetensors").blocks
        ('weight', 'bias')
        """
        _, metadata = load_tensors(path, ())
        try:
            said = metadata["posterior"]
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            names, blocks, constants = tuple(said["names"]), tuple(said["blocks"]), Constants(**said["constants"])
            dtype = next(iter(tensors.values())).dtype
            made = cls(said["kind"], names, blocks, said["features"], constants, dtype=dtype)
            made.load_state_dict(tensors)
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} is not a file of a posterior: {error}") from error
        made.metadata = said["fitted"]
        return made.eval()

    def _of(self, network: nn.Module, features: Tensor) -> Float[Tensor, "batch vectors blocks"]:
        return network(features).unflatten(-1, (len(self.names), len(self.blocks)))

    def _sigma(self, features: Tensor) -> Float[Tensor, "batch vectors blocks"]:
        return (0.5 * self._of(self.log_variance, features).clamp(-8, 2)).exp()

    def _threshold(self, u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        psi1, psi2 = self.log_psi.exp()
        return psi1 * (1 + psi2 * u)

    def _passes(self, mu: Float[Tensor, "..."], sigma: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return mu.abs() >= self._threshold(uncertainty(mu, sigma))


def _network(features: int, out: int, bias: float, random: Generator, dtype: torch.dtype) -> nn.Sequential:
    """Linear, ReLU, Linear, of weights N(0, 0.01^2)."""
    hidden = max(features // 4, out)
    network = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, out)).to(dtype)
    for name, p in network.named_parameters():
        with torch.no_grad():
            if name.endswith("weight"):
                p.copy_(0.01 * torch.randn(p.shape, generator=random, dtype=dtype))
            else:
                p.fill_(bias if name == "2.bias" else 0.0)
    return network
