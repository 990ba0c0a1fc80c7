"""Computes the routers of transformers models with ``topk_gate``, in place and undoably."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from taskloom.nn.change_class import change_class, is_changed, is_changed_below, restore_class
from taskloom.nn.router import TopKRouter
from taskloom.nn.router_presets import GateOptions, deepseek_v2_options, deepseek_v3_options

# Rows on which a router and its patch are compared before the patch takes its place.
_PROBE_ROWS = 16
# Parts of names that tell a router, whatever its class.
ROUTER_PATHS = ("gate", "router")


@dataclass(frozen=True)
class RouterFamily:
    """How a class of routers in transformers computes.

    Attributes
    ----------
    options
        Reads the gate's options from the router's attributes, as its own forward does at each call.
    float32_logits
        Whether the product is made in float32.
    float32_weights
        Whether the experts' weights are float32; else they have the dtype of the logits.
    """

    options: Callable[[Any], GateOptions]
    float32_logits: bool = False
    float32_weights: bool = False


def _softmax(router: Any) -> GateOptions:
    return GateOptions(k=router.top_k, renormalize=bool(router.norm_topk_prob))


def _renormalized(router: Any) -> GateOptions:
    return GateOptions(k=router.top_k, renormalize=True)


def _deepseek_v2(router: Any) -> GateOptions:
    return deepseek_v2_options(router.top_k, router.topk_method, router.num_group, router.topk_group, router.routed_scaling_factor)


def _deepseek_v3(router: Any) -> GateOptions:
    return deepseek_v3_options(router.top_k, router.num_group, router.topk_group, bool(router.norm_topk_prob), router.routed_scaling_factor)


FAMILIES: Mapping[str, RouterFamily] = {
    "DeepseekV2TopkRouter": RouterFamily(_deepseek_v2, float32_logits=True, float32_weights=True),
    "DeepseekV3TopkRouter": RouterFamily(_deepseek_v3, float32_logits=True, float32_weights=True),
    "GptOssTopKRouter": RouterFamily(_renormalized),
    "MixtralTopKRouter": RouterFamily(_renormalized, float32_weights=True),
    "OlmoeTopKRouter": RouterFamily(_softmax),
    "Qwen2MoeTopKRouter": RouterFamily(_softmax),
    "Qwen3MoeTopKRouter": RouterFamily(_softmax),
}


def routers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model, by path, in its order.

    A router is a :class:`TopKRouter`, an instance of a class in :data:`FAMILIES`, or a module named ``gate`` or ``router`` that has a
    matrix as its weight and stands beside the ``experts``.
    """
    found = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        weight = getattr(module, "weight", None)
        beside = name in ROUTER_PATHS and isinstance(weight, Tensor) and weight.dim() == 2
        known = isinstance(module, TopKRouter) or type(module).__name__ in FAMILIES
        if known or (beside and hasattr(model.get_submodule(parent), "experts")):
            found[path] = module
    return found


def router_logits(router: Any, rows: Tensor, float32: bool) -> Tensor:
    """The logits of rows ``[T, D]`` by a router's weight and, where it has one, its bias."""
    weight, bias = router.weight, getattr(router, "bias", None)
    if float32:
        rows, weight, bias = rows.float(), weight.float(), None if bias is None else bias.float()
    return linear(rows, weight, bias)


def _members(base: Any) -> dict[str, Any]:
    family = FAMILIES[base.__name__]

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = router_logits(self, hidden_states.reshape(-1, self.hidden_dim), family.float32_logits)
        choice = getattr(self, "e_score_correction_bias", None)
        # Where the model has float64 weights, its routers still score in float32.
        scored = logits.float() if logits.dtype == torch.float64 else logits
        gate = family.options(self).gate(scored, None if choice is None else choice.float(), ids_dtype=torch.int64)
        return logits, gate.weight.to(torch.float32 if family.float32_weights else logits.dtype), gate.ids

    return {"forward": forward}


def _check_same(path: str, router: Any) -> None:
    """Raise where a router of a known name does not compute what is known of that name."""
    patched: Callable[..., tuple[Tensor, Tensor, Tensor]] = _members(type(router))["forward"]
    drawn = torch.randn(_PROBE_ROWS, router.weight.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    rows = drawn.to(device=router.weight.device, dtype=router.weight.dtype)
    name = f"patch_routers: {path}: this version of transformers' {type(router).__name__}"
    with torch.no_grad():
        theirs = type(router).forward(router, rows)
        try:
            ours = patched(router, rows)
        except AttributeError as error:
            raise ValueError(f"{name} lacks the attribute {error.name!r}") from None
    kinds = [(one.dtype, one.shape) for one in theirs if isinstance(one, Tensor)] if isinstance(theirs, tuple) else []
    if kinds != [(one.dtype, one.shape) for one in ours]:
        raise ValueError(f"{name} returns something else than expected")
    if not torch.allclose(ours[0], theirs[0], rtol=_rough(ours[0]), atol=1e-5, equal_nan=True):
        raise ValueError(f"{name} returns other logits than expected")
    # Sorted: scores that are equal may be taken by other experts.
    weight, expected = (one[1].float().sort(-1).values for one in (ours, theirs))
    if not torch.allclose(weight, expected, rtol=_rough(ours[1]), atol=1e-6, equal_nan=True):
        raise ValueError(f"{name} weighs experts in another way than expected")


def _rough(values: Tensor) -> float:
    return 2e-2 if torch.finfo(values.dtype).bits < 32 else 1e-4


class RouterPatch:
    """What :func:`patch_routers` changed; :meth:`remove` undoes it, and so does leaving a ``with`` block.

    Attributes
    ----------
    paths
        The routers' paths.
    """

    def __init__(self, routers: dict[str, nn.Module]) -> None:
        self._routers = dict(routers)
        self.paths = tuple(routers)

    def remove(self) -> None:
        """Give the routers back their own forward; a second time does nothing.

        Raises
        ------
        ValueError
            If the class of routers was changed again since, as torch's parametrisations and fully_shard do. These stay patched, and all
            others are given back: undo the later change and call :func:`unpatch_routers`.
        """
        stuck = [f"{path} ({type(router).__name__})" for path, router in self._routers.items() if is_changed_below(router, _members)]
        for router in self._routers.values():
            if is_changed(router, _members):
                restore_class(router, _members)
        self._routers.clear()
        if stuck:
            raise ValueError(f"RouterPatch: the class of {', '.join(stuck)} was changed again since; undo that, then call unpatch_routers")

    def __enter__(self) -> Self:
        """Nothing: the routers are patched already."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove the patch; where an exception is passing, it has a note of routers that stay patched."""
        try:
            self.remove()
        except ValueError as stuck:
            if error is None:
                raise
            error.add_note(str(stuck))


def patch_routers(model: nn.Module) -> RouterPatch:
    """Let :func:`taskloom.topk_gate` compute the gates of a transformers model.

    Parameters
    ----------
    model
        A model of transformers 5 with the routers of OLMoE, Qwen2-MoE, Qwen3-MoE, Mixtral, GPT-OSS, DeepSeek-V2 or DeepSeek-V3: modules
        of their own that return (logits, weights, ids). Tested with 5.24. Those of 5.10 are the same but for DeepSeek's; those of 5.0 but
        GPT-OSS's return something else, and in transformers 4 most models route in the forward of the block around the gate: what does
        not compute the same is refused.

    Returns
    -------
    RouterPatch
        Its ``remove()`` undoes the patch. It is a context manager that does so too.

    Raises
    ------
    ValueError
        If the model has no router, has one of another class, or one is patched already. If a router of a known class does not compute
        here what is known of it: every router is compared with its patch on a few rows first, so that one on the meta device is refused.
        Nothing is changed then.

    Notes
    -----
    Routers return what they returned before: the same structure and dtypes, logits computed by the same product, ids best first and,
    among equal scores, by the lower id; torch.topk leaves their order open. Parameters, buffers, hooks and the state dict stay as they
    are, and an instance stays one of its class. Copies and pickles of a patched model are patched: see :func:`unpatch_routers`.
    """
    routers = routers_of(model)
    if not routers:
        raise ValueError(f"patch_routers: model: expected routers of {', '.join(FAMILIES)}; {type(model).__name__} has no router")
    for path, router in routers.items():
        name = type(router).__name__
        if is_changed(router, _members):
            raise ValueError(f"patch_routers: {path}: the router is patched already")
        if name not in FAMILIES:
            raise ValueError(f"patch_routers: {path}: expected a router of {', '.join(FAMILIES)}, got {name}")
        if "forward" in vars(router):
            raise ValueError(f"patch_routers: {path}: its forward was replaced by something else, which a patch would not call")
        if router.weight.is_meta:
            raise ValueError(f"patch_routers: {path}: expected a router with values, to compare its patch with, got one on the meta device")
        _check_same(path, router)
    for router in routers.values():
        change_class(router, _members)
    return RouterPatch(routers)


def unpatch_routers(model: nn.Module) -> list[str]:
    """Undo :func:`patch_routers` in a model, such as a copy of one that was patched.

    Returns
    -------
    list of str
        The paths of the routers that were patched.

    Raises
    ------
    ValueError
        As :meth:`RouterPatch.remove`.
    """
    modules = dict(model.named_modules())
    patched = {path: one for path, one in modules.items() if is_changed(one, _members) or is_changed_below(one, _members)}
    RouterPatch(patched).remove()
    return list(patched)
