"""Losses of routers from the statistics of :func:`taskloom.topk_gate`, and the full probabilities of a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from taskloom.ops._checks import check_floating
from taskloom.ops.gating._indices import check_count, check_indices
from taskloom.reference.arithmetic import accumulation_dtype

Layers = Tensor | Sequence[Tensor]


def _layers(op: str, name: str, given: object) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if not isinstance(given, Sequence) or isinstance(given, str):
        got = "None; topk_gate gives it with statistics=True" if given is None else type(given).__name__
        raise TypeError(f"{op}: {name}: expected a tensor or a list of them, got {got}")
    for place, one in enumerate(given):
        if not isinstance(one, Tensor):
            got = "None; topk_gate gives it with statistics=True" if one is None else type(one).__name__
            raise TypeError(f"{op}: {name}[{place}]: expected a tensor, got {got}")
    return list(given)


def _token_counts(op: str, tokens: int | Tensor | Sequence[int | Tensor], layers: int) -> list[int | Tensor]:
    counts = list(tokens) if isinstance(tokens, Sequence) else [tokens] * layers
    if len(counts) != layers:
        raise ValueError(f"{op}: tokens: expected one number or {layers}, as layers, got {len(counts)}")
    for count in counts:
        if isinstance(count, Tensor):
            if count.numel() != 1:
                raise ValueError(f"{op}: tokens: expected a tensor of one number, got shape {tuple(count.shape)}")
        else:
            check_count(op, "tokens", count, least=0)
    return counts


def _share(numerator: Tensor, denominator: int | Tensor) -> Tensor:
    """A quotient; 0 / 1 where there are no tokens."""
    return numerator / (denominator.clamp(min=1) if isinstance(denominator, Tensor) else max(denominator, 1))


def _balance(counts: Tensor, prob_sum: Tensor, tokens: int | Tensor) -> Tensor:
    shares = _share(counts.to(accumulation_dtype(prob_sum)), tokens)
    return counts.shape[0] * (shares * _share(prob_sum.to(shares.dtype), tokens)).sum()


def load_balance_loss(
    counts: Layers,
    prob_sum: Layers,
    tokens: int | Tensor | Sequence[int | Tensor],
    k: int,
    *,
    convention: Literal["switch", "transformers"] = "switch",
) -> Tensor:
    """How unevenly tokens are routed, as a loss: ``E * sum_e (counts_e / (T k)) * (prob_sum_e / T)``.

    Parameters
    ----------
    counts, prob_sum
        ``[E]`` each: how often each expert was chosen, and the sum over tokens of its probability, as :func:`taskloom.topk_gate` gives
        them with ``statistics``. Or a list of them each, by layer.
    tokens
        The number of tokens T, or a tensor of it (then the host does not wait for a GPU); for layers one for all of them or a list. Where
        it is 0 the loss is 0.
    k
        Experts per token.
    convention
        ``"switch"``, the default: 1 where routing is balanced, and the mean over layers. ``"transformers"``: as in that library k times
        as much, and the layers are taken for one whose tokens are those of all.

    Returns
    -------
    Tensor
        One number, float32 (float64 for float64 sums). Its gradient goes to prob_sum.

    Raises
    ------
    TypeError
        If prob_sum is not floating point, or a number is no integer.
    ValueError
        If shapes or the number of layers do not fit, there is no layer, k is below 1, or there is no such convention.

    Notes
    -----
    Source: Switch Transformers, arXiv 2101.03961, equations 4 to 6, with counts of k choices per token; transformers'
    ``load_balancing_loss_func``.
    """
    op = "load_balance_loss"
    all_counts, sums = _layers(op, "counts", counts), _layers(op, "prob_sum", prob_sum)
    if not sums or len(all_counts) != len(sums):
        raise ValueError(f"{op}: counts, prob_sum: expected as many layers in both, at least one, got {len(all_counts)} and {len(sums)}")
    for place, (count, one) in enumerate(zip(all_counts, sums, strict=True)):
        check_floating(op, f"prob_sum[{place}]", one)
        if count.dtype == torch.bool:
            raise TypeError(f"{op}: counts[{place}]: expected numbers, got torch.bool")
        if one.dim() == 1 and count.shape == one.shape and one.shape != sums[0].shape:
            raise ValueError(f"{op}: prob_sum[{place}]: expected {len(sums[0])} experts, as in the first layer, got {len(one)}")
        if one.dim() != 1 or count.shape != one.shape:
            raise ValueError(f"{op}: counts, prob_sum: expected shape [E] everywhere, got {tuple(count.shape)} and {tuple(one.shape)}")
    check_count(op, "k", k)
    each = _token_counts(op, tokens, len(sums))
    if convention == "switch":
        losses = [_balance(*layer) for layer in zip(all_counts, sums, each, strict=True)]
        return torch.stack(losses).mean() / k
    if convention == "transformers":
        total: int | Tensor = sum(each[1:], start=each[0])
        return _balance(torch.stack(all_counts).sum(0), torch.stack(sums).sum(0), total)
    raise ValueError(f"{op}: convention: expected 'switch' or 'transformers', got {convention!r}")


def router_z_loss(lse: Layers) -> Tensor:
    """The mean square of the log-sum-exp of router logits, which keeps them small.

    Parameters
    ----------
    lse
        Log-sum-exps of any shape, as :func:`taskloom.topk_gate` gives them with ``statistics``; or a list of them by layer, whose tokens
        are taken together.

    Returns
    -------
    Tensor
        One number, float32 (float64 for float64); 0 where there are no tokens.

    Raises
    ------
    TypeError
        If lse is not floating point.
    ValueError
        If there is no layer.

    Notes
    -----
    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    op = "router_z_loss"
    layers = _layers(op, "lse", lse)
    if not layers:
        raise ValueError(f"{op}: lse: expected at least one layer, got none")
    for place, layer in enumerate(layers):
        check_floating(op, f"lse[{place}]", layer)
    dtype = accumulation_dtype(*layers)
    total = torch.stack([layer.to(dtype).square().sum() for layer in layers]).sum()
    return total / max(sum(layer.numel() for layer in layers), 1)


def gate_probabilities(
    logits: Tensor, rows: Tensor | None = None, *, score: Literal["softmax", "sigmoid"] = "softmax", temperature: float = 1.0
) -> Tensor:
    """The probabilities of all experts for a few rows of router logits, such as the last token of each sequence.

    Parameters
    ----------
    logits
        ``[T, E]``; float32, bfloat16, float16 or float64.
    rows
        ``[B]``, int32 or int64: the rows that are wanted, in this order. Default None: all.
    score
        ``"softmax"``, the default, or ``"sigmoid"``, of which each expert's share of its row's sum is taken. Summed over all rows this is
        the ``prob_sum`` of :func:`taskloom.topk_gate`.
    temperature
        What logits are divided by first. Default 1.

    Returns
    -------
    Tensor
        ``[B, E]``, float32 (float64 for float64 logits); each row adds up to 1.

    Raises
    ------
    TypeError
        If logits are not floating point or rows no integers.
    ValueError
        If shapes do not fit, there is no such score, or the temperature is not above 0.
    IndexError
        If there is no such row (on a GPU that is a device-side assertion).

    Notes
    -----
    Source: the routing vectors of RoMA, arXiv 2511.07419, and C3PO, arXiv 2504.07964: all experts' probabilities before the choice.

    A composition of torch's own kernels, differentiable any number of times: of T rows only B are computed with and kept for backward, so
    that there is little to fuse.
    """
    op = "gate_probabilities"
    check_floating(op, "logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits: expected shape [T, E] with at least one expert, got {tuple(logits.shape)}")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"{op}: score: expected 'softmax' or 'sigmoid', got {score!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature: expected a finite number above 0, got {temperature}")
    if rows is not None:
        check_indices(op, "rows", rows)
        if rows.dim() != 1:
            raise ValueError(f"{op}: rows: expected shape [B], got {tuple(rows.shape)}")
        logits = logits.index_select(0, rows)
    scaled = logits.to(accumulation_dtype(logits)) / temperature
    if score == "softmax":
        return scaled.softmax(-1)
    # The shares of sigmoids, also where all of a row are too small for their sum to be told from 0.
    return torch.nn.functional.logsigmoid(scaled).softmax(-1)
