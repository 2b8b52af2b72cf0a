"""Ways to patch that are measured against each other, a file each. One whose library is missing is reported as such."""

from __future__ import annotations

from bench.providers.hooks import Hooks
from bench.providers.hooks_batch import HooksBatch
from bench.providers.naive import Naive
from bench.providers.nnsight import NNsight
from bench.providers.nnsight_invokes import NNsightInvokes
from bench.providers.ours import Batch, Expanded, Layered, Packed, Reordered, RowStep
from bench.providers.provider import Cannot, Provider
from bench.providers.pyvene import Pyvene
from bench.providers.transformer_lens import TransformerLens

_OURS = (Packed, Reordered, Layered, RowStep, Expanded, Batch, Naive)
_ALL = (*_OURS, Hooks, HooksBatch, TransformerLens, NNsight, NNsightInvokes, Pyvene)
PROVIDERS: dict[str, type[Provider]] = {provider.name: provider for provider in _ALL}

__all__ = ["PROVIDERS", "Cannot", "Provider"]
