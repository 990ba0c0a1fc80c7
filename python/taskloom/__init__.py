"""Kernels for task-specific weights: sparse masked updates, low-rank merges, channel routing, expert gating; and a checkpoint merger.

Importing this module costs nothing: what it offers is imported on first use, and torch only with the first op.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskloom import archive as archive
    from taskloom import merge as merge
    from taskloom import ops as ops
    from taskloom import optim as optim
    from taskloom.merge import TaskVector as TaskVector
    from taskloom.ops import (
        ExpertOrder,
        Explanation,
        GateStatistics,
        MagnitudeThreshold,
        SoftmaxMix,
        SparseMergeStatistics,
        TopKGate,
        backend,
        batch_norm_silu,
        block_scale_merge,
        channel_scale,
        dora_merge,
        expert_combine,
        expert_sort,
        explain,
        gate_probabilities,
        gate_statistics,
        kernel_linear,
        kernel_merge,
        kernel_quantile,
        load_balance_loss,
        lora_feature_gate,
        lowrank_apply,
        lowrank_merge,
        lowrank_merge_,
        lowrank_merge_tasks,
        lowrank_norm,
        lowrank_unmerge_,
        magnitude_histogram,
        magnitude_mask,
        magnitude_threshold,
        manifold_loss,
        mask_count,
        masked_adamw_,
        masked_compress,
        masked_restore,
        masked_sgd_,
        masked_switch_,
        masked_update,
        masked_update_,
        multi_gate_combine,
        multi_task_vector,
        pack_mask,
        prefix_conv2d,
        prefix_linear,
        prefix_norm,
        ragged_prefix_conv2d,
        rmm_fit,
        rmm_linear,
        rmm_reconstruct,
        router_z_loss,
        sparse_merge,
        split_threshold,
        stream_softmax_mix,
        task_mask,
        threshold_from_histograms,
        topk_gate,
        unpack_mask,
        weighted_ce,
        window_conv2d,
        window_group_norm_silu,
        window_layer_norm,
        window_linear,
        window_norm_conv2d,
        window_norm_linear,
    )

# Offered here besides the ops, which __all__ lists.
_OTHERS = {"TaskVector": "merge"}
_SUBPACKAGES = ("archive", "merge", "methods", "nn", "ops", "optim", "reference", "triton_kernels")

__all__ = [
    "ExpertOrder",
    "Explanation",
    "GateStatistics",
    "MagnitudeThreshold",
    "SoftmaxMix",
    "SparseMergeStatistics",
    "TopKGate",
    "backend",
    "batch_norm_silu",
    "block_scale_merge",
    "channel_scale",
    "dora_merge",
    "expert_combine",
    "expert_sort",
    "explain",
    "gate_probabilities",
    "gate_statistics",
    "kernel_linear",
    "kernel_merge",
    "kernel_quantile",
    "load_balance_loss",
    "lora_feature_gate",
    "lowrank_apply",
    "lowrank_merge",
    "lowrank_merge_",
    "lowrank_merge_tasks",
    "lowrank_norm",
    "lowrank_unmerge_",
    "magnitude_histogram",
    "magnitude_mask",
    "magnitude_threshold",
    "manifold_loss",
    "mask_count",
    "masked_adamw_",
    "masked_compress",
    "masked_restore",
    "masked_sgd_",
    "masked_switch_",
    "masked_update",
    "masked_update_",
    "multi_gate_combine",
    "multi_task_vector",
    "pack_mask",
    "prefix_conv2d",
    "prefix_linear",
    "prefix_norm",
    "ragged_prefix_conv2d",
    "rmm_fit",
    "rmm_linear",
    "rmm_reconstruct",
    "router_z_loss",
    "sparse_merge",
    "split_threshold",
    "stream_softmax_mix",
    "task_mask",
    "threshold_from_histograms",
    "topk_gate",
    "unpack_mask",
    "weighted_ce",
    "window_conv2d",
    "window_group_norm_silu",
    "window_layer_norm",
    "window_linear",
    "window_norm_conv2d",
    "window_norm_linear",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _SUBPACKAGES:
        return importlib.import_module(f"taskloom.{name}")
    if name in _OTHERS:
        return getattr(importlib.import_module(f"taskloom.{_OTHERS[name]}"), name)
    if name in __all__:
        # Kept, because the search for a name that the module lacks takes longer than a small op.
        found = globals()[name] = getattr(importlib.import_module("taskloom.ops"), name)
        return found
    if name == "__version__":
        from importlib.metadata import version

        return version("taskloom")
    raise AttributeError(f"module 'taskloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_OTHERS, *_SUBPACKAGES, "__version__"})
