"""What tests say in one word: a function of z at every layer, a vector added to the residual stream."""

from functools import partial

import torch

import engine


def on_z(model, edit):
    """The edits of a backend that call edit(layer, z) at every layer."""
    return {"z": {layer: partial(edit, layer) for layer in range(model.shape.n_layers)}}


def after(model, vector, layers, positions=-1):
    """A patch that adds the vector after one layer, or after one a row: None where nothing is added."""
    each = layers if isinstance(layers, list) else [layers]
    units = torch.zeros(len(each), model.shape.n_layers, dtype=torch.bool)
    for row, layer in enumerate(each):
        if layer is not None:
            units[row, layer] = True
    return engine.Patch("resid_post", units, vector, positions, mode="add")
