"""The head of a language model and its weighted cross-entropy in one op, on the supervised rows alone."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from taskloom.ops._backends import active_transform, choose, kernels
from taskloom.ops._checks import check_dtype, check_floating, check_shape
from taskloom.ops._register import register
from taskloom.reference import masked as reference
from taskloom.reference.arithmetic import accumulation_dtype


def _check_rows(op: str, hidden: Tensor, weight: Tensor | None, targets: Tensor) -> int:
    """Check hidden, head and targets; the number of words."""
    check_floating(op, "hidden", hidden)
    if hidden.dim() == 0:
        raise ValueError(f"{op}: hidden: expected at least one dimension, got none")
    if weight is not None:
        check_floating(op, "weight", weight)
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{op}: weight: expected shape [V, {hidden.shape[-1]}], as many columns as hidden has, got {tuple(weight.shape)}"
            )
    check_dtype(op, "targets", targets, torch.int64)
    check_shape(op, "targets", targets, hidden.shape[:-1], "hidden without its last dimension")
    vocabulary = hidden.shape[-1] if weight is None else weight.shape[0]
    if vocabulary == 0:
        raise ValueError(f"{op}: {'hidden' if weight is None else 'weight'}: expected at least one word, got none")
    return vocabulary


def _row_weights(op: str, weights: Tensor | None, targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """A weight for each row, 0 where the target is to be ignored."""
    if weights is None:
        return (targets != ignore_index).to(dtype)
    if not isinstance(weights, Tensor):
        raise TypeError(f"{op}: weights: expected a tensor, got {type(weights).__name__}")
    if weights.dtype not in (torch.float32, torch.float64, torch.bool):
        raise TypeError(f"{op}: weights: expected float32, float64 or bool, got {weights.dtype}")
    check_shape(op, "weights", weights, targets.shape, "targets")
    if weights.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: weights requires grad, and the op has no gradient for it; pass weights.detach()")
    return weights.to(dtype).masked_fill(targets == ignore_index, 0)


def _first(wrong: Tensor) -> int:
    return int(wrong.nonzero()[0])


def _check_targets(op: str, targets: Tensor, counted: Tensor, vocabulary: int) -> None:
    wrong = counted & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        row = _first(wrong)
        raise ValueError(f"{op}: targets: expected 0 to {vocabulary - 1}, got {int(targets[row])} at row {row}") from None


def _check_values(op: str, targets: Tensor, weights: Tensor, vocabulary: int) -> None:
    wrong = ~(weights.isfinite() & (weights >= 0))
    if wrong.any():
        row = _first(wrong)
        raise ValueError(f"{op}: weights: expected finite values of at least 0, got {float(weights[row])} at row {row}") from None
    if not weights.any():
        raise ValueError(f"{op}: weights: there is no supervised token, every weight is 0 or every target is ignored") from None
    _check_targets(op, targets, weights > 0, vocabulary)


@overload
def weighted_ce(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int = -100,
    return_log_probs: Literal[False] = False,
) -> Tensor: ...


@overload
def weighted_ce(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int = -100,
    return_log_probs: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def weighted_ce(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int = -100,
    return_log_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weighted mean of the cross-entropy of next words, from hidden states and head, without ever holding the logits.

    ``sum_i weights[i] * ce[i] / sum_i weights[i]`` with ``ce[i] = -log_softmax(hidden[i] @ weight.T)[targets[i]]``. Rows of weight 0
    take no part: they are neither multiplied by the head nor given a gradient, so that time and memory follow the supervised rows.

    Parameters
    ----------
    hidden
        Shape ``[N, D]``, or ``[..., D]``; float32, bfloat16, float16 or, on the CPU, float64. With ``weight=None`` the logits, ``[N, V]``.
    weight
        The head, shape ``[V, D]``, of any of these dtypes; None where ``hidden`` holds logits.
    targets
        int64 of shape ``[N]``, or ``[...]``: word numbers, 0 to V - 1 at supervised rows. They are not shifted: row i predicts
        ``targets[i]``. At rows of weight 0 any value may stand.
    weights
        float32, float64 or bool like ``targets``, finite and at least 0; 0 is a row that is not supervised. Default None: all are 1.
    ignore_index
        Rows with this target have weight 0. Default -100.
    return_log_probs
        Whether to return the rows' log-probabilities too. Default False.

    Returns
    -------
    loss : Tensor
        Scalar, float32 (float64 where hidden or weight is float64), summed in double in the order of the rows.
    log_probs : Tensor
        Only with ``return_log_probs``: ``-ce`` in the same dtype, of targets' shape, 0 at rows of weight 0. Differentiable as the loss is.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes or devices do not fit, weights are negative or not finite, no row is supervised, or a supervised row's target is no word
        (the last three in compiled code: RuntimeError).
    RuntimeError
        If ``weights`` requires grad while gradients are recorded.

    Notes
    -----
    Source: the weighted, normalised loss of TL-Training, arXiv 2412.15495, section 3; the vocabulary in tiles with an online log-sum-exp,
    as in Cut Cross-Entropy, Wijmans et al., ICLR 2025, arXiv 2411.09009.

    Products, sums and exponentials are float32 (float64 for float64), whatever the dtypes of hidden and weight, which may differ: a
    bfloat16 hidden with a float32 head is computed as float32. Logits are not rounded to bfloat16 on the way, as ``hidden @ weight.T``
    would round them. Under autocast nothing is cast: pass ``weight.to(hidden.dtype)`` where the head shall be multiplied in that dtype.

    Differentiable once with respect to ``hidden`` and ``weight``; the gradients have their dtypes, and those of rows that are not
    supervised are exactly 0. Forward keeps three numbers a row, and backward computes the logits' tiles again. Gradients are not computed
    in forward, which would save one of four matrix products: both would be held from forward to backward, they would serve a single
    upstream gradient (not that of the log-probabilities, which PPO needs), and the work would be lost where nobody asks for them. Under
    ``torch.no_grad()`` nothing is kept.

    On the CPU results have the same bits for any number of threads.
    """
    op = "weighted_ce"
    vocabulary = _check_rows(op, hidden, weight, targets)
    shape = targets.shape
    rows, flat = hidden.reshape(targets.numel(), hidden.shape[-1]), targets.reshape(-1)
    factors = _row_weights(op, weights, targets, ignore_index, accumulation_dtype(hidden, weight)).reshape(-1)
    chosen = choose(op, rows, *(() if weight is None else (weight,)), flat, factors)
    if chosen == "reference":
        if active_transform() is None:
            _check_values(op, flat, factors, vocabulary)
        loss, log_probs = reference.weighted_ce(rows, weight, flat, factors)
    else:
        try:
            loss, log_probs, _, _ = kernels(chosen).weighted_ce.default(rows, weight, flat, factors)
        except RuntimeError:
            # The kernel looks at every weight and supervised target anyway, before it computes.
            _check_values(op, flat, factors, vocabulary)
            raise
    return (loss, log_probs.reshape(shape)) if return_log_probs else loss


def weighted_ce_backward(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    coefficient: Tensor,
    log_sum_exp: Tensor,
    for_hidden: bool = True,
    for_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of :func:`weighted_ce`: ``coefficient * (softmax - onehot)`` of every row, pushed through the head.

    Parameters
    ----------
    hidden, weight
        As in :func:`weighted_ce`, hidden with two dimensions.
    targets
        int64 of shape ``[N]``; not looked at where the coefficient is 0.
    coefficient
        float32 (float64 where hidden or weight is float64) of shape ``[N]``: the gradient with respect to each row's cross-entropy, of
        either sign. A row of coefficient 0 takes no part.
    log_sum_exp
        Of coefficient's dtype and shape: that of each row's logits; not looked at where the coefficient is 0.
    for_hidden, for_weight
        Which gradients to compute. Default True; with ``weight=None`` there is none for the head.

    Returns
    -------
    hidden_gradient, weight_gradient : Tensor or None
        In the shapes and dtypes of hidden and weight, contiguous; None where not asked for.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, or a target is no word (in compiled code: RuntimeError).

    Notes
    -----
    Source: this library. It has no gradient itself: a second derivative of the loss raises.
    """
    op = "weighted_ce_backward"
    vocabulary = _check_rows(op, hidden, weight, targets)
    if hidden.dim() != 2:
        raise ValueError(f"{op}: hidden: expected two dimensions, got {hidden.dim()}")
    dtype = accumulation_dtype(hidden, weight)
    for name, tensor in (("coefficient", coefficient), ("log_sum_exp", log_sum_exp)):
        check_dtype(op, name, tensor, dtype)
        check_shape(op, name, tensor, targets.shape, "targets")
    wants_weight = for_weight and weight is not None
    chosen = choose(op, hidden, *(() if weight is None else (weight,)), targets, coefficient, log_sum_exp)
    arguments = (hidden, weight, targets, coefficient, log_sum_exp, for_hidden, wants_weight)
    if chosen == "reference":
        _check_targets(op, targets, coefficient != 0, vocabulary)
        return reference.weighted_ce_backward(*arguments)
    try:
        hidden_gradient, weight_gradient = kernels(chosen).weighted_ce_backward.default(*arguments)
    except RuntimeError:
        _check_targets(op, targets, coefficient != 0, vocabulary)
        raise
    return hidden_gradient if for_hidden else None, weight_gradient if wants_weight else None


def _fake_weighted_ce(hidden: Tensor, weight: Tensor | None, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden, weight)
    log_probs, log_sum_exp, share = (hidden.new_empty((hidden.shape[0],), dtype=dtype) for _ in range(3))
    return hidden.new_empty((), dtype=dtype), log_probs, log_sum_exp, share


def _fake_weighted_ce_backward(
    hidden: Tensor, weight: Tensor | None, targets: Tensor, coefficient: Tensor, log_sum_exp: Tensor, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    head = hidden if weight is None else weight
    return hidden.new_empty(hidden.shape if for_hidden else (0,)), head.new_empty(head.shape if for_weight else (0,))


def _setup_weighted_ce(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, weights = inputs
    _, _, log_sum_exp, share = output
    ctx.mark_non_differentiable(log_sum_exp, share)
    ctx.save_for_backward(hidden, weight, targets, weights, log_sum_exp, share)


def _weighted_ce_backward(ctx: Any, for_loss: Tensor, for_log_probs: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    hidden, weight, targets, weights, log_sum_exp, share = ctx.saved_tensors
    for_hidden, for_weight, *_ = ctx.needs_input_grad
    coefficient = for_loss * share - for_log_probs.masked_fill(weights == 0, 0)
    gradients = ctx.ops.weighted_ce_backward.default(hidden, weight, targets, coefficient, log_sum_exp, for_hidden, for_weight)
    return gradients[0] if for_hidden else None, gradients[1] if for_weight else None, None, None


register("weighted_ce", fake=_fake_weighted_ce, backward=_weighted_ce_backward, setup_context=_setup_weighted_ce)
register("weighted_ce_backward", fake=_fake_weighted_ce_backward)
