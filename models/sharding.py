"""Models too big for one device: heads shared out over processes, layers put on several devices.

Under transformers' tensor parallelism every process makes the same calls, each for its own heads of every layer. The
only things exchanged here are those that must be whole: z that was captured, and the gradient of values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, distributed, nn

from models.interface import Shape, UnsupportedModelError

# A W_O that transformers' plan names like this is given all heads: it is not sharded, or it is sharded by its output,
# or it takes its part of the input itself. One that is "rowwise" is given the heads of its process.
WHOLE = frozenset({None, "replicate", "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep"})
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what torchrun tells a process


def options(device_map: Any, tp_plan: str | dict[str, str] | None) -> dict[str, Any]:
    """What `from_pretrained` is told. Raises ValueError for a plan that is none, or in a process that is alone."""
    if device_map is None and tp_plan is None:
        return {}
    if not find_spec("accelerate"):
        raise ImportError("device_map and tp_plan need accelerate: pip install accelerate")
    if tp_plan is None:
        return {"device_map": device_map}
    if tp_plan != "auto" and not isinstance(tp_plan, dict):
        raise ValueError(f"tp_plan must be 'auto' or a dict of module names and styles, got {tp_plan!r}")
    if distributed.is_available() and distributed.is_initialized():
        n_processes = distributed.get_world_size()
    elif all(name in os.environ for name in LAUNCHED):
        n_processes = int(os.environ["WORLD_SIZE"])
    else:
        raise ValueError(
            "tp_plan shares a model out over processes, and this one was started alone: "
            "run `torchrun --nproc-per-node N script.py`, N a divisor of the heads and of the key/value heads"
        )
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan=tp_plan, tp_size=n_processes)}


def head_mesh(hf: nn.Module, projections: Sequence[nn.Module], shape: Shape) -> Any:
    """The processes that share out the heads of every layer, in order; None if each has all of them.

    Raises UnsupportedModelError for heads that do not go round, or weights sharded in a way not known to be exact.
    """
    if not is_parallel(hf):
        return None
    n_processes, mesh = getattr(hf, "_tp_size", None) or 1, getattr(hf, "_device_mesh", None)
    if n_processes == 1 or mesh is None or mesh.size() != n_processes:
        raise UnsupportedModelError(
            f"the weights of {type(hf).__name__} are sharded, and not by transformers' tensor parallelism alone: "
            "expected models.load(..., tp_plan='auto'), or a model loaded by transformers with such a plan"
        )
    plan: dict[str, str] = hf.tp_plan  # type: ignore[assignment]
    names = {module: name for name, module in hf.named_modules()}
    styles = [plan.get(_generic(names[projection])) for projection in projections]
    if WHOLE.issuperset(styles):
        return None
    for projection, style in zip(projections, styles, strict=True):
        attention, _, name = names[projection].rpartition(".")
        given = {name: style}
        for reads in ("q_proj", "k_proj", "v_proj"):
            if hasattr(hf.get_submodule(attention), reads):
                given[reads] = plan.get(_generic(f"{attention}.{reads}"))
        if given != {reads: "rowwise" if reads == name else "colwise" for reads in given}:
            raise UnsupportedModelError(
                f"{attention} is sharded as {given}: heads go to processes by 'colwise' projections to them and a "
                "'rowwise' one from them, in every layer; give another tp_plan"
            )
    if shape.n_heads % n_processes or shape.n_kv_heads % n_processes:
        raise UnsupportedModelError(
            f"{shape.n_heads} heads with {shape.n_kv_heads} key/value heads cannot be shared out evenly over "
            f"{n_processes} processes: start a number that divides both, or give a tp_plan that leaves attention whole"
        )
    return mesh["tp"] if mesh.ndim > 1 else mesh


def is_parallel(hf: nn.Module) -> bool:
    """Whether other processes hold parts of the weights: DTensors, of which there are none without a process group."""
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in hf.parameters())


def own(x: Tensor, dim: int, mesh: Any) -> Tensor:
    """The part of this process of a tensor that all have; its gradient is gathered, and whole on each of them."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(dim % x.ndim)]).to_local()


def gather(x: Tensor, dim: int, mesh: Any) -> Tensor:
    """The parts of all processes, one after the other, on each of them."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(x, mesh, [Shard(dim % x.ndim)], run_check=False).full_tensor()


def execution_device(module: nn.Module) -> torch.device:
    """Where a module with a weight computes: where the weight is or, while it is offloaded, where it will be."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    hook: Any = getattr(module, "_hf_hook", None)  # accelerate's: one, or a sequence of them
    places = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    found = [place for place in places if place is not None]
    return torch.device(found[0]) if weight.is_meta and found else weight.device


def _generic(path: str) -> str:
    """As plans name a module of every layer: model.layers.3.mlp -> model.layers.*.mlp."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)
