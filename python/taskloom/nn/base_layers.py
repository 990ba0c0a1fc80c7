"""Which linear layers can be adapted by a module that computes with their weight instead of calling them."""

from __future__ import annotations

from torch import nn

from taskloom.ops._checks import FLOATING


def check_base_layer(name: str, layer: nn.Module) -> None:
    """Raise TypeError unless a layer is computed by ``torch.nn.functional.linear`` from a floating-point weight of its own.

    Others would be adapted without an error and compute something else: quantised layers, those with a forward pass of their own, and
    those whose weight is made anew in each call (``torch.nn.utils.parametrize``, weight norm).
    """
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{name}: expected nn.Linear, got {type(layer).__name__}")
    weight = layer._parameters.get("weight")
    if weight is None:
        raise TypeError(f"{name}: expected a weight that is a parameter, got one that {type(layer).__name__} computes; make it one first")
    if nn.parameter.is_lazy(weight):
        raise TypeError(f"{name}: expected a weight with a shape, got the one of a {type(layer).__name__} that was never called")
    if weight.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a weight of float32, bfloat16, float16 or float64, got {weight.dtype}")
    if type(layer).forward is not nn.Linear.forward:
        raise TypeError(f"{name}: expected nn.Linear, got {type(layer).__name__}, whose forward pass is another")
