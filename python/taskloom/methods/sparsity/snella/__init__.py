"""Sparse fine-tuning at the memory of LoRA: updates that a kernel makes of thin factors, and layers that compete for non-zero entries.

Source: SNELLA, "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models", 2025, arXiv 2510.24037, and its
predecessor SNELL, "Expanding Sparse Tuning for Low Memory Usage", NeurIPS 2024, arXiv 2411.01800.
"""

from __future__ import annotations

from taskloom.methods.sparsity.snella.allocator import SparsityAllocator, allocate, budget
from taskloom.methods.sparsity.snella.config import KernelLoraConfig, snell_config, snella_config
from taskloom.methods.sparsity.snella.model import (
    fold_kernel_lora,
    inject_kernel_lora,
    kernel_lora_state_dict,
    load_kernel_lora_state_dict,
)
from taskloom.nn import KernelLinear as KernelLoraLinear

__all__ = [
    "KernelLoraConfig",
    "KernelLoraLinear",
    "SparsityAllocator",
    "allocate",
    "budget",
    "fold_kernel_lora",
    "inject_kernel_lora",
    "kernel_lora_state_dict",
    "load_kernel_lora_state_dict",
    "snell_config",
    "snella_config",
]
