"""The router of a sparse mixture of experts: scores, choice and weights of experts in one pass over the logits."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import FLOATING, check_floating, check_shape, plain_number
from taskloom.ops._register import register
from taskloom.ops.gating._indices import check_count, check_indices
from taskloom.reference import gating as reference
from taskloom.reference.arithmetic import accumulation_dtype

MOST_CHOSEN = 32
Gated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class TopKGate(NamedTuple):
    """What :func:`taskloom.topk_gate` finds; the last three are None without ``statistics``.

    Attributes
    ----------
    weight
        ``[..., k]``, float32 (float64 where a tensor is float64): the weight of each chosen expert.
    ids
        ``[..., k]``, int32 or int64: the chosen experts by falling choice score, equal ones by their number.
    counts
        ``[E]``, int32: how often each expert was chosen.
    prob_sum
        ``[E]`` in the dtype of weight: the sum over rows of each expert's probability, which is its softmax, or its share of the row's
        sigmoids, in the limit also where these are too small to be told from 0.
    lse
        ``[...]`` in the dtype of weight: the log-sum-exp of each row's logits.
    """

    weight: Tensor
    ids: Tensor
    counts: Tensor | None
    prob_sum: Tensor | None
    lse: Tensor | None


def _check_score(op: str, score: str) -> None:
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"{op}: score: expected 'softmax' or 'sigmoid', got {score!r}")


def _check_weighing(op: str, eps: float, temperature: float) -> None:
    if not eps >= 0:
        raise ValueError(f"{op}: eps: expected at least 0, got {eps}")
    if not 1e-30 <= temperature <= 1e30:
        raise ValueError(f"{op}: temperature: expected 1e-30 to 1e+30, got {temperature}")


def _check_groups(op: str, experts: int, k: int, n_group: int, topk_group: int, group_score: str, group_mask: float) -> None:
    if n_group < 1 or experts % n_group != 0:
        raise ValueError(f"{op}: n_group: expected a divisor of {experts}, the number of experts, got {n_group}")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"{op}: topk_group: expected 1 to {n_group}, the number of groups, got {topk_group}")
    size = experts // n_group
    if topk_group * size < k:
        raise ValueError(
            f"{op}: topk_group: expected at least {-(-k // size)} groups of {size} experts, so that {k} can be chosen, got {topk_group}"
        )
    if group_score not in ("max", "top2"):
        raise ValueError(f"{op}: group_score: expected None, 'max' or 'top2', got {group_score!r}")
    if group_score == "top2" and size < 2 and topk_group < n_group:
        raise ValueError(f"{op}: group_score: 'top2' needs groups of at least two experts, got {n_group} of one")
    if math.isnan(group_mask):
        raise ValueError(f"{op}: group_mask: expected a number, got nan")


def topk_gate(
    logits: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
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
    statistics: bool = False,
) -> TopKGate:
    """Choose k experts for each row of router logits, and weigh them.

    Scores are ``s = softmax(logits / temperature)`` over all experts, or their sigmoid. Chosen are the k largest ``s + bias``, equal ones
    by the lower number; ``bias`` chooses only. The weights are ``s`` of the chosen experts, with ``renormalize`` divided by their sum
    + eps, times ``scale``.

    Parameters
    ----------
    logits
        ``[..., E]``; float32, bfloat16, float16 or float64.
    k
        Experts per row, 1 to 32 and at most E.
    bias
        ``[E]`` of any of these dtypes; default None: zeros. It gets no gradient.
    score
        ``"softmax"``, the default, or ``"sigmoid"``.
    n_group, topk_group
        Experts are in ``n_group`` groups of neighbours, and only those of the ``topk_group`` best groups (equal ones by the lower number)
        can be chosen. Default 1 and 1: all experts.
    group_score
        What a group is judged by: its best choice score (``"max"``) or the sum of its two best (``"top2"``). Default None: ``"top2"``
        with a bias, else ``"max"``.
    group_mask
        What takes the place of the choice scores of the other groups. Default -inf: none of their experts is chosen. With 0.0, as
        transformers has it for DeepSeek-V3, they are where those of the kept groups are negative.
    renormalize
        Whether the weights of a row are divided by their sum + ``eps``. Default False.
    scale
        Factor of the weights. Default 1.
    eps
        Added to the sum of a row's weights; at least 0. Default 0: softmax and ``renormalize`` are then the softmax of the chosen logits.
    temperature
        Divides the logits; 1e-30 to 1e+30. Default 1.
    ids_dtype
        torch.int32, the default, or torch.int64.
    statistics
        Whether to count too how often each expert was chosen, and to add up its probabilities and the rows' log-sum-exps. Default False.

    Returns
    -------
    TopKGate
        weight, ids, counts, prob_sum and lse.

    Raises
    ------
    TypeError
        If a tensor or ``ids_dtype`` is of another dtype, or a number is none or a tensor that requires grad.
    ValueError
        If k, groups, scores, eps or temperature are out of range or shapes do not fit.

    Notes
    -----
    Source: the routers of OLMoE, Qwen3-MoE, Mixtral, GPT-OSS, DeepSeekMoE, DeepSeek-V2 and V3 (arXiv 2412.19437, section 2.1.2), in one op.

    ids are the same on every device. Without a bias the order of the experts is that of the logits, exactly: also where scores round to
    the same float. With a bias, with groups judged by ``"top2"``, or masked by another value than -inf, scores are computed in one
    arithmetic (float32, or float64 where a tensor is float64) that is the same to the bit everywhere. A row with a NaN among its logits
    (or choice scores, or its groups' scores) gets experts 0 to k - 1 and NaN for weights. A row's result does not depend on other rows;
    sums over rows are added up in an order that depends on their number alone.

    Differentiable once with respect to logits, through weight, prob_sum and lse, by a kernel that computes the scores again; twice with
    ``taskloom.backend("reference")``. Logits without influence get a gradient of exactly 0. scale, eps, temperature and group_mask are
    numbers without gradient, and constants of a compiled graph and of a Triton kernel: another value compiles once more.
    """
    op = "topk_gate"
    if not (isinstance(logits, Tensor) and logits.dtype in FLOATING):
        check_floating(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits: expected shape [..., E] with at least one expert, got {tuple(logits.shape)}")
    experts = logits.shape[-1]
    if not (type(k) is type(n_group) is type(topk_group) is int):
        for name, number in (("k", k), ("n_group", n_group), ("topk_group", topk_group)):
            check_count(op, name, number)
    if not 1 <= k <= MOST_CHOSEN or k > experts:
        raise ValueError(f"{op}: k: expected 1 to {min(MOST_CHOSEN, experts)} of {experts} experts, got {k}")
    _check_score(op, score)
    if type(scale) is not float:
        scale = plain_number(op, "scale", scale)
    if type(eps) is not float:
        eps = plain_number(op, "eps", eps)
    if type(temperature) is not float:
        temperature = plain_number(op, "temperature", temperature)
    if type(group_mask) is not float:
        group_mask = plain_number(op, "group_mask", group_mask)
    given: tuple[Tensor, ...] = (logits,)
    if bias is not None:
        check_floating(op, "bias", bias)
        check_shape(op, "bias", bias, (experts,), "the experts of logits")
        given = (logits, bias)
    judged = ("max" if bias is None else "top2") if group_score is None else group_score
    if n_group != 1 or topk_group != 1 or group_score is not None or group_mask != -math.inf:
        _check_groups(op, experts, k, n_group, topk_group, judged, group_mask)
    if eps != 0 or temperature != 1:
        _check_weighing(op, eps, temperature)
    if ids_dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: ids_dtype: expected torch.int32 or torch.int64, got {ids_dtype}")
    rows = logits if logits.dim() == 2 else logits.reshape(logits.shape[:-1].numel(), experts)
    run = kernel(op, *given) or reference.topk_gate
    weight, ids, counts, prob_sum, lse = run(
        rows,
        bias,
        k,
        score,
        n_group,
        topk_group,
        judged,
        group_mask,
        renormalize,
        scale,
        eps,
        temperature,
        ids_dtype == torch.int64,
        statistics,
    )
    if rows is not logits:
        shape = logits.shape[:-1]
        weight, ids = weight.reshape(*shape, k), ids.reshape(*shape, k)
        lse = lse.reshape(shape) if statistics else lse
    return TopKGate(weight, ids, counts, prob_sum, lse) if statistics else TopKGate(weight, ids, None, None, None)


def topk_gate_backward(
    logits: Tensor,
    ids: Tensor,
    weight: Tensor,
    dweight: Tensor | None = None,
    dprob_sum: Tensor | None = None,
    dlse: Tensor | None = None,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    eps: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """The gradient of the logits of :func:`taskloom.topk_gate`.

    Parameters
    ----------
    logits
        ``[T, E]``.
    ids, weight
        ``[T, k]``, what the op found.
    dweight, dprob_sum, dlse
        Gradients ``[T, k]``, ``[E]`` and ``[T]`` of weight, prob_sum and lse, in the dtype of weight; default None: zeros.
    score, renormalize, scale, eps, temperature
        As in the op.

    Returns
    -------
    Tensor
        ``[T, E]`` in the dtype of logits.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "topk_gate_backward"
    check_floating(op, "logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{op}: logits: expected shape [T, E] with at least one expert, got {tuple(logits.shape)}")
    tokens, experts = logits.shape
    check_indices(op, "ids", ids)
    if ids.dim() != 2 or len(ids) != tokens or not 1 <= ids.shape[1] <= min(MOST_CHOSEN, experts):
        raise ValueError(f"{op}: ids: expected shape [{tokens}, k] with k of 1 to {min(MOST_CHOSEN, experts)}, got {tuple(ids.shape)}")
    check_floating(op, "weight", weight)
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: weight: expected float32 or float64, got {weight.dtype}")
    check_shape(op, "weight", weight, ids.shape, "ids")
    given = [logits, ids, weight]
    for name, slopes, shape in (("dweight", dweight, ids.shape), ("dprob_sum", dprob_sum, (experts,)), ("dlse", dlse, (tokens,))):
        if slopes is not None:
            check_floating(op, name, slopes)
            if slopes.dtype != weight.dtype:
                raise TypeError(f"{op}: {name}: expected {weight.dtype} as weight, got {slopes.dtype}")
            check_shape(op, name, slopes, shape, "what the op found")
            given.append(slopes)
    _check_score(op, score)
    _check_weighing(op, eps, temperature)
    run = kernel(op, *given) or reference.topk_gate_backward
    found: Tensor = run(logits, ids, weight, dweight, dprob_sum, dlse, score, renormalize, scale, eps, temperature)
    return found


def _fake_gate(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    group_mask: float,
    renormalize: bool,
    scale: float,
    eps: float,
    temperature: float,
    long_ids: bool,
    statistics: bool,
) -> Gated:
    tokens, experts = logits.shape
    dtype = accumulation_dtype(logits, bias)
    return (
        logits.new_empty((tokens, k), dtype=dtype),
        logits.new_empty((tokens, k), dtype=torch.int64 if long_ids else torch.int32),
        logits.new_empty(experts if statistics else 0, dtype=torch.int32),
        logits.new_empty(experts if statistics else 0, dtype=dtype),
        logits.new_empty(tokens if statistics else 0, dtype=dtype),
    )


def _fake_backward(
    logits: Tensor,
    ids: Tensor,
    weight: Tensor,
    dweight: Tensor | None,
    dprob_sum: Tensor | None,
    dlse: Tensor | None,
    score: str,
    renormalize: bool,
    scale: float,
    eps: float,
    temperature: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Gated) -> None:
    logits, _, _, score, _, _, _, _, renormalize, scale, eps, temperature, _, statistics = inputs
    weight, ids, counts, *sums = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(ids, counts, *([] if statistics else sums))
    ctx.save_for_backward(logits, ids, weight)
    ctx.options = (score, renormalize, scale, eps, temperature)


def _backward(
    ctx: Any, dweight: Tensor | None, dids: None, dcounts: None, dprob_sum: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    dlogits = ctx.ops.topk_gate_backward.default(*ctx.saved_tensors, dweight, dprob_sum, dlse, *ctx.options)
    return (dlogits, *([None] * 13))


register("topk_gate", fake=_fake_gate, backward=_backward, setup_context=_setup)
register("topk_gate_backward", fake=_fake_backward)
