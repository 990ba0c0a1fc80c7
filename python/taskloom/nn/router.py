"""The router of a sparse mixture of experts: a matrix, and the gate of its logits in one op."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from taskloom.nn.router_presets import GateOptions, router_preset
from taskloom.ops import TopKGate
from taskloom.ops._checks import check_floating
from taskloom.reference.arithmetic import without_autocast


@without_autocast
def _float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x.float(), weight.float(), None if bias is None else bias.float())


class TopKRouter(nn.Module):
    """Chooses k of E experts for each token, and weighs them.

    Parameters
    ----------
    dim, num_experts, k
        Features of a token D, experts E, and experts of a token.
    bias
        Whether the logits have a learned bias ``[E]``, as GPT-OSS's. Default False.
    selection_bias
        Whether there is a buffer ``[E]``, zero at first, that is added to the scores for the choice alone, as DeepSeek-V3's; it takes no
        gradient. Default False.
    float32_logits
        Whether the product with the weight is made in float32 whatever the dtypes, under autocast too, as DeepSeek's. Default False.
    score, n_group, topk_group, group_score, group_mask, renormalize, scale, eps, temperature, ids_dtype
        As of :func:`taskloom.topk_gate`.
    device, dtype
        Of the parameters.

    Raises
    ------
    TypeError, ValueError
        As :func:`taskloom.topk_gate`.

    Attributes
    ----------
    weight
        ``[E, D]``.
    bias, e_score_correction_bias
        ``[E]`` or None: the two biases, with the names that checkpoints have. The second is made in float32; ``.to(torch.bfloat16)``
        of a module rounds it, as all its buffers.
    options
        What the gate is called with; it may be replaced.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        bias: bool = False,
        selection_bias: bool = False,
        float32_logits: bool = False,
        score: Literal["softmax", "sigmoid"] = "softmax",
        n_group: int = 1,
        topk_group: int = 1,
        group_score: Literal["max", "top2"] | None = None,
        group_mask: float = -math.inf,
        renormalize: bool = False,
        scale: float = 1.0,
        eps: float = 0.0,
        temperature: float = 1.0,
        ids_dtype: torch.dtype = torch.int32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"TopKRouter: {name}: expected at least 1, got {value}")
        self.options = GateOptions(
            k=k,
            score=score,
            n_group=n_group,
            topk_group=topk_group,
            group_score=group_score,
            group_mask=group_mask,
            renormalize=renormalize,
            scale=scale,
            eps=eps,
            temperature=temperature,
        )
        self.dim, self.num_experts, self.float32_logits, self.ids_dtype = dim, num_experts, float32_logits, ids_dtype
        # The op's own checks of the options, before anything is routed.
        self.options.gate(torch.empty(0, num_experts), ids_dtype=ids_dtype)
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        choice = torch.empty(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("e_score_correction_bias", choice)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear does, uniform within 1 / sqrt(inputs), and set both biases to 0."""
        bound = 1 / math.sqrt(self.dim)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.zero_()

    @classmethod
    def from_config(cls, hf_config: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The router of a model that transformers knows, or whose checkpoints bring their own code.

        Parameters
        ----------
        hf_config
            The model's configuration: an object as transformers makes it, or a mapping with the fields of its ``config.json``. Its
            ``model_type`` is olmoe, qwen2_moe, qwen3_moe, mixtral, gpt_oss, deepseek (DeepSeekMoE), deepseek_v2 or deepseek_v3.
        device, dtype
            Of the parameters.

        Returns
        -------
        TopKRouter
            With weights drawn anew; ``load_state_dict`` takes those of the model's router, whose names are the same. Weights of experts
            are float32, where the model's own router may round them to the dtype of its logits.

        Raises
        ------
        ValueError
            If the configuration is of another model, lacks a field or has None there, or asks for another gate.

        Notes
        -----
        transformers leaves DeepSeek-V2's ``norm_topk_prob`` unread, and so does this.
        """
        preset = router_preset(hf_config)
        options = {name: getattr(preset.options, name) for name in preset.options.__dataclass_fields__}
        return cls(
            preset.dim,
            preset.num_experts,
            bias=preset.bias,
            selection_bias=preset.selection_bias,
            float32_logits=preset.float32_logits,
            device=device,
            dtype=dtype,
            **options,
        )

    def logits(self, x: Tensor) -> Tensor:
        """The logits ``[..., E]`` of tokens ``[..., D]``, in the dtype of the product."""
        if not self.float32_logits:
            return linear(x, self.weight, self.bias)
        return _float32_linear(x, self.weight, self.bias)

    def forward(self, x: Tensor, statistics: bool = False) -> TopKGate:
        """Route tokens.

        Parameters
        ----------
        x
            ``[..., D]``.
        statistics
            Whether the gate tells its statistics too, for :func:`taskloom.load_balance_loss` and :func:`taskloom.router_z_loss`.

        Returns
        -------
        TopKGate
            weight ``[..., k]`` and ids ``[..., k]``, best first; counts, prob_sum and lse, or None.
        """
        check_floating("TopKRouter", "x", x)
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"TopKRouter: x: expected shape (..., {self.dim}), got {tuple(x.shape)}")
        return self.gate(self.logits(x), statistics)

    def gate(self, logits: Tensor, statistics: bool = False) -> TopKGate:
        """The gate of logits ``[..., E]``; what :meth:`forward` does after :meth:`logits`."""
        choice = self.e_score_correction_bias
        return self.options.gate(logits, None if choice is None else choice.float(), ids_dtype=self.ids_dtype, statistics=statistics)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{self.dim}, {self.num_experts}, {self.options}"
