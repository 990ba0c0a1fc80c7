"""A vision transformer with SNELLA's updates in our form and in the official one, and with LoRA in ours and in PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernel_forms
from optional import obstacle, optional
from taskloom.methods.sparsity.snella import inject_kernel_lora, snella_config
from taskloom.methods.sparsity.snella.config import TARGETS
from taskloom.nn import KernelLinear, LowRankConfig, inject
from taskloom.nn.fused_linear import split_fused

HEAD = "head"
CLASSES = 5


@dataclass(frozen=True)
class Setting:
    """What all arms have in common; none has dropout, so that their gradients can be compared."""

    rank: int = 32
    sparsity: float = 0.9


class OfficialLinear(nn.Module):
    """A frozen layer with SNELLA's update as the official code computes it: each step a matrix of the weight's size.

    ``kept`` keeps them for the backward, as autograd does by itself; otherwise the branch runs under activation checkpointing, as there.
    """

    def __init__(self, layer: KernelLinear, kept: bool) -> None:
        super().__init__()
        self.base_layer, self.sparsity, self.kept = layer.base_layer, layer.sparsity, kept
        self.A, self.B = layer.A, layer.B
        self.alpha, self.gamma, self.beta = layer.alpha, layer.gamma, layer.beta
        self.register_buffer("coef", layer.coef)

    def _branch(self, x: Tensor, *factors: Tensor) -> Tensor:
        A, B, coef, alpha, gamma, beta = factors
        return x @ kernel_forms.gated(A, B, coef, (alpha, gamma, beta), self.sparsity)

    def forward(self, x: Tensor) -> Tensor:
        given = (x, self.A, self.B, self.coef, self.alpha, self.gamma, self.beta)
        branch = self._branch(*given) if self.kept else checkpoint(self._branch, *given, use_reentrant=False)
        return self.base_layer(x) + branch


@torch.no_grad()
def _ours(model: nn.Module, setting: Setting) -> nn.Module:
    options = {"dropout": 0.0, "drop_path": 0.0, "modules_to_save": (HEAD,)}
    inject_kernel_lora(model, snella_config(setting.rank, setting.sparsity, **options))
    # Factors of the size that training gives them: at the start the update would be lost in the rounding of the base.
    generator = torch.Generator().manual_seed(1)
    for layer in _kernel_layers(model).values():
        for factor in (layer.A, layer.B):
            factor.copy_(0.1 * torch.randn(factor.shape, generator=generator))
    return model


def _kernel_layers(model: nn.Module) -> dict[str, KernelLinear]:
    return {path: one for path, one in model.named_modules() if isinstance(one, KernelLinear)}


def _official(model: nn.Module, setting: Setting, kept: bool) -> nn.Module:
    for path, layer in _kernel_layers(_ours(model, setting)).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, OfficialLinear(layer, kept))
    return model


def _lora(model: nn.Module, setting: Setting) -> nn.Module:
    inject(model, LowRankConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=TARGETS, modules_to_save=(HEAD,)))
    return model


def _peft(model: nn.Module, setting: Setting) -> nn.Module:
    peft = optional("peft")
    assert peft is not None
    config = peft.LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=list(TARGETS), modules_to_save=[HEAD])
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


ARMS: dict[str, Callable[[nn.Module, Setting], nn.Module]] = {
    "ours": _ours,
    "lora": _lora,
    "peft lora": _peft,
    "official": lambda model, setting: _official(model, setting, kept=False),
    "eager": lambda model, setting: _official(model, setting, kept=True),
}
# The arms whose losses and gradients have to be ours.
SAME = ("official", "eager")


def arm_obstacle(arm: str) -> str | None:
    """Why an arm cannot run here."""
    return obstacle("peft") if arm == "peft lora" else None


def adapted(arm: str, model: nn.Module, setting: Setting) -> nn.Module:
    """A copy of a model whose qkv layers are taken apart, with what the arm trains. All copies have the same frozen tensors."""
    frozen = {id(one): one for path, one in model.named_parameters() if not path.startswith(f"{HEAD}.")}
    for one in frozen.values():
        one.requires_grad_(False)
    split = copy.deepcopy(model, dict(frozen))
    return ARMS[arm](split, setting).train()


def vision_transformer(name: str, pixels: int, depth: int | None = None) -> nn.Module:
    """A model of timm's with random weights, the same for the same name, its qkv layers taken apart."""
    timm = optional("timm")
    assert timm is not None
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=CLASSES, img_size=pixels, **({} if depth is None else {"depth": depth}))
    split_fused(model)
    return model


class Training:
    """A model in training on one batch."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, autocast: torch.dtype | None = None) -> None:
        self.model, self.images, self.labels, self.autocast = model, images, labels, autocast
        self.trained = {path: one for path, one in model.named_parameters() if one.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-3, weight_decay=1e-4)

    def loss(self, autocast: torch.dtype | None) -> Tensor:
        with torch.autocast(self.images.device.type, autocast, enabled=autocast is not None):
            return nn.functional.cross_entropy(self.model(self.images), self.labels)

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients of what is trained, in the parameters' dtype throughout."""
        loss = self.loss(None)
        found = torch.autograd.grad(loss, list(self.trained.values()))
        return loss.detach(), dict(zip(self.trained, found, strict=True))

    def step(self) -> None:
        """Forward, backward, and the optimizer's step; finished when it returns."""
        self.loss(self.autocast).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.images.is_cuda:
            torch.cuda.synchronize()
