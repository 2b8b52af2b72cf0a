"""`load` a model by name, `wrap` one in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from models import lens, nnsight_backend, sharding, zoo
from models.encoders import Encoder
from models.huggingface import HuggingFace
from models.interface import Model, UnsupportedModelError

Backend: TypeAlias = Literal["huggingface", "transformer_lens", "nnsight"]


def load(
    name: str | Path,
    *,
    backend: Backend = "huggingface",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    device_map: Any = None,
    tp_plan: str | dict[str, str] | None = None,
) -> Model:
    """Open a model, ready to be patched.

    name:       "smollm2-135m" or "smollm2-eyes", which sees (both install as packages), a local folder, or a hub id;
                language or image-text models.
    backend:    who runs it: "huggingface" (default), "transformer_lens" or "nnsight".
    dtype:      of the weights; default float32.
    device:     where they go; default "cpu".
    device_map: passed on to transformers instead of a device: "auto", or a dict of modules (needs accelerate). Layers
                go to several devices, to the CPU's memory or the disk, and run one after the other.
    tp_plan:    tensor parallelism of transformers, instead of a device: "auto" for the model's own plan, or a dict of
                one. Each process that `torchrun` started holds a part of every layer; all make the same calls, and get
                the same results. Backend "huggingface" only.

    Raises FileNotFoundError if there is no such model, or it cannot be fetched; UnsupportedModelError if its layout
    is unknown, or its heads cannot be shared out evenly over the processes; ValueError for options that exclude each
    other, or tp_plan in a process that was started alone; ImportError naming the extra to install for a backend, or
    for an image-text model's processor, that is not there.

    >>> models.load("smollm2-135m").shape.n_layers
    30
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    if tp_plan is not None and (device_map is not None or backend != "huggingface"):
        raise ValueError(
            "tp_plan puts a part of every layer on each process's own device and runs them by backend 'huggingface': "
            f"got device_map={device_map!r}, backend={backend!r}"
        )
    spread = sharding.options(device_map, tp_plan)
    processor = None
    if str(name) == zoo.SMOLLM2:
        hf, tokenizer = zoo.smollm2(dtype)
        if spread:  # from the files that were just read
            hf, tokenizer, processor = _from_folder_or_hub(hf.config._name_or_path, dtype, spread)
    elif str(name) == zoo.EYES:
        if spread:
            raise ValueError(f"{zoo.EYES} goes to one device: got device_map={device_map!r}, tp_plan={tp_plan!r}")
        from models import eyes

        hf, processor = eyes.load(dtype)
        tokenizer = None
    else:
        hf, tokenizer, processor = _from_folder_or_hub(name, dtype, spread)
    if device_map is None and not sharding.is_parallel(hf):
        hf = hf.to(device)
    if backend == "huggingface":
        return wrap(hf, tokenizer, processor=processor, name=str(name))
    module: Any = lens if backend == "transformer_lens" else nnsight_backend
    return module.from_huggingface(hf, tokenizer, processor=processor, name=str(name))


def wrap(
    model: Any,
    tokenizer: Any = None,
    *,
    processor: Any = None,
    name: str | None = None,
    projections: Sequence[str] | None = None,
) -> Model:
    """Take a model that is already in memory: nothing is copied or changed.

    model:       a `transformers` model (language, image-text, encoder), a TransformerLens `TransformerBridge`, or an
                 nnsight `NNsight` or `TransformersModel`: it is recognised.
    tokenizer:   needed for string prompts and text answers; token ids work without.
    processor:   of an image-text model, for prompts with images; brings its tokenizer.
    name:        how saved vectors and messages call it.
    projections: for an architecture unknown here: dotted names of the attention output projections, a layer each,
                 as in ["model.layers.0.attention.wo", ...].

    Raises TypeError for anything but a transformers model, UnsupportedModelError for one of unknown layout.

    >>> models.wrap(model.hf, tokenizer=model.tokenizer).shape == model.shape
    True
    """
    if lens.is_bridge(model):
        return _whole(lens.TransformerLens(model, tokenizer, processor, name))
    if nnsight_backend.is_nnsight(model):
        return _whole(nnsight_backend.NNsightBackend(model, tokenizer, processor, name, projections))
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    model = _inner(model)
    generates = getattr(model, "can_generate", lambda: False)()
    kind = HuggingFace if generates else Encoder
    return kind(model, tokenizer, processor, name, projections)


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model that torch.compile, or peft, has wrapped: adapters are modules in it."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            kinds: Any = model.peft_config
            if learned := [kind.peft_type.value for kind in kinds.values() if kind.is_prompt_learning]:
                raise UnsupportedModelError(
                    f"{', '.join(learned)} puts tokens of its own before every prompt, at places that are not the "
                    "prompt's: expected adapters inside the model (LoRA and its kin)"
                )
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def _whole(model: HuggingFace) -> Model:
    """A model of a backend that knows nothing of heads on other processes."""
    if sharding.is_parallel(model.hf):
        raise UnsupportedModelError(
            f"{model.name} is under tensor parallelism, which {type(model).__name__} does not follow: "
            "wrap the transformers model itself"
        )
    return model


def _from_folder_or_hub(name: str | Path, dtype: torch.dtype, spread: dict[str, Any]) -> tuple[Any, Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    try:
        if type(AutoConfig.from_pretrained(name)) in AutoModelForImageTextToText._model_mapping:
            processor = AutoProcessor.from_pretrained(name)  # before the weights: it may lack a library
            return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **spread), None, processor
        return (
            AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **spread),
            AutoTokenizer.from_pretrained(name),
            None,
        )
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
        raise ImportError(
            f"the processor of {str(name)!r} needs torchvision, the version for torch {torch.__version__}: "
            "pip install 'headpatch[vision]'"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if spread and isinstance(error, ValueError):
            raise ValueError(f"the model {str(name)!r} cannot be spread over devices as asked for: {reason}") from error
        raise FileNotFoundError(
            f"cannot open the model {str(name)!r}: expected {zoo.SMOLLM2!r}, {zoo.EYES!r}, a folder with a "
            f"transformers model, or the id of one on a hub that can be reached ({reason})"
        ) from error
