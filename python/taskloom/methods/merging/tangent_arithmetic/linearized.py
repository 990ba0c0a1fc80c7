"""A model's first-order Taylor expansion around given weights, as a module that trains and is edited like the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from taskloom.merge import TaskVector
from taskloom.methods.merging.places import one_a_place
from taskloom.methods.merging.tangent_arithmetic.derivative_check import check_derivatives
from taskloom.methods.merging.tangent_arithmetic.forward_mode import Expansion, expand
from taskloom.methods.merging.tangent_arithmetic.frozen import Differences, check_same, frozen_copy, tau_dtype, tied_names
from taskloom.methods.merging.tangent_arithmetic.weight_decay import decay_whole_weights


class LinearizedModel(nn.Module):
    """``f_lin(x; p) = f(x; p0) + J(x; p0) (p - p0)`` by one forward-mode pass.

    The trainable parameters, ``params.<original name>``, are the differences ``tau = p - p0``, zero at first where only ``model`` is
    given. They are kept in float32 (float64 for a float64 model) whatever ``to``, ``half`` or ``bfloat16`` is called, so that small
    updates of a bfloat16 model are not lost. The base, weights and buffers both, is kept as buffers ``base.<original name>``: the state
    dict holds all that the model needs.

    The base always runs in eval mode: dropout is off, normalisation layers use their running statistics, ``train()`` changes nothing of it.

    Parameters
    ----------
    model
        The model; copied, so that its weights, mode and training flags stay as they are. Parameters that do not require a gradient
        keep a difference of zero in training.
    init_model
        The model at p0; ``model`` is then at p. Its buffers count, those of ``model`` do not. Default None: ``model`` itself.

    Raises
    ------
    TypeError
        If a parameter is complex.
    ValueError
        If the models' parameters differ in names or shapes, a weight is not finite (both where ``init_model`` is given), or there is no
        floating-point parameter.

    Notes
    -----
    Source: Ortiz-Jimenez, Favero, Frossard, "Task Arithmetic in the Tangent Space", NeurIPS 2023, arXiv 2305.12827, section 3 and
    appendix B. That the trainable tensor is tau and not p is this library's; :meth:`decay_whole_weights` gives weight decay its
    meaning back.

    At ``p = p0`` the output is ``f(x; p0)`` bit for bit, f's weights not requiring a gradient (where they do, torch rounds some products
    otherwise), under the same attention backend and autocast.

    A tangent has the dtype of its weight: in a bfloat16 model tau is rounded to bfloat16 where it is used, to its own size and not to
    that of the weights.
    """

    # What is made in inference mode cannot be trained afterwards.
    @torch.inference_mode(False)
    def __init__(self, model: nn.Module, init_model: nn.Module | None = None) -> None:
        super().__init__()
        start = model if init_model is None else init_model
        if init_model is not None:
            check_same(model, init_model)
        self._names = tied_names(model, start)
        if not self._names:
            raise ValueError(f"LinearizedModel: model: {type(model).__name__} has no floating-point parameter")
        ends, starts = (dict(one.named_parameters(remove_duplicate=False)) for one in (model, start))
        taus = {}
        for name in self._names:
            p, p0 = ends[name].detach(), starts[name].detach()
            dtype = torch.promote_types(tau_dtype(p0.dtype), p.dtype)
            tau = torch.zeros_like(p0, dtype=dtype) if init_model is None else p.to(p0.device, dtype) - p0.to(dtype)
            taus[name] = nn.Parameter(tau, requires_grad=ends[name].requires_grad)
        self.params = Differences(taus)
        self.base = frozen_copy(start)
        self._swapped = {name: one_a_place(self.base, aliases) for name, aliases in self._names.items()}

    @classmethod
    def from_pretrained_pair(cls, base: nn.Module, finetuned: nn.Module) -> Self:
        """Post-hoc linearisation: an ordinarily fine-tuned model's weights in the expansion around its base."""
        return cls(finetuned, init_model=base)

    def train(self, mode: bool = True) -> Self:
        """Set ``training``, which the outputs do not depend on."""
        super().train(mode)
        self.base.eval()
        return self

    def _taus(self) -> dict[str, nn.Parameter]:
        found = dict(self.params.named_parameters())
        return {name: found[name] for name in self._names}

    def _bases(self) -> dict[str, Tensor]:
        buffers = dict(self.base.named_buffers(remove_duplicate=False))
        return {name: buffers[name] for name in self._names}

    def _expand(self, taus: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Expansion:
        bases = self._bases()
        along = {name: taus[name].to(base.dtype) for name, base in bases.items()}
        return expand(self._function(args, kwargs), bases, along)

    def _function(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Mapping[str, Tensor]], Any]:
        """The base's outputs as a function of its parameters."""

        def outputs(point: Mapping[str, Tensor]) -> Any:
            # Every place is given: what was one tensor may have become several, as buffers do where a module is moved.
            every = {alias: point[name] for name, aliases in self._swapped.items() for alias in aliases}
            return functional_call(self.base, every, args, kwargs, tie_weights=False)

        return outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, linearised: floating-point tensors, alone or in tuples, dicts or other pytrees.

        Raises
        ------
        TypeError
            If an output is a tensor of another dtype, or no tensor.
        RuntimeError
            If an operation of the model has no forward-mode derivative; the message names it, and for attention how to get one that has.
        """
        expansion = self._expand(self._taus(), args, kwargs)
        return expansion.structure([value + change for value, change in zip(expansion.values, expansion.changes, strict=True)])

    def expand(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The two terms of :meth:`forward` apart: ``f(x; p0)`` and ``J tau``, each structured as the model's outputs.

        The outputs at ``p0 + alpha tau`` are the first plus alpha times the second, so that one pass serves all alphas.
        """
        expansion = self._expand(self._taus(), args, kwargs)
        return expansion.structure(expansion.values), expansion.structure(expansion.changes)

    def expand_along(self, vector: TaskVector, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As :meth:`expand`, along a task vector in place of the model's own tau.

        Raises
        ------
        KeyError, ValueError
            As :meth:`apply_task_vector_`.
        """
        expansion = self._expand(self._checked(vector, "expand_along"), args, kwargs)
        return expansion.structure(expansion.values), expansion.structure(expansion.changes)

    def check_derivatives(self, *args: Any, **kwargs: Any) -> None:
        """Compare the model's forward-mode derivative on these inputs with its reverse-mode one, for once before training.

        An operation registered with ``torch.library`` that has a gradient but no forward-mode derivative gives zero for it and says
        nothing: the linearised model would lack its part. This takes a forward and a backward pass of the model and shows it.

        Raises
        ------
        RuntimeError
            If the two differ by more than rounding, or no output depends on a parameter.

        Warns
        -----
        UserWarning
            If the outputs do not depend on a parameter that is trained. It is unused on these inputs; or the model uses its tensor past
            its name (in a list of its own, or by ``.data``), and is then taken as constant in it.
        """
        check_derivatives(self._function(args, kwargs), self._bases(), {name for name, tau in self._taus().items() if tau.requires_grad})

    def task_vector(self) -> TaskVector:
        """A copy of tau, of regime ``"linear"``; tied parameters are in it under all their names, as in a state dict."""
        taus = self._taus()
        deltas = {alias: taus[name].detach() for name, aliases in self._names.items() for alias in aliases}
        return TaskVector.from_deltas(deltas, regime="linear")

    def _checked(self, vector: TaskVector, doing: str) -> dict[str, Tensor]:
        """The vector's tensors by the names of ``params``, zero where it has none."""
        if not isinstance(vector, TaskVector):
            raise TypeError(f"LinearizedModel: {doing}: expected a TaskVector, got {type(vector).__name__}")
        if vector.regime != "linear":
            raise ValueError(
                f"LinearizedModel: {doing}: expected a linear task vector, got a {vector.regime} one; "
                "for post-hoc linearisation say so: vector.as_regime('linear')"
            )
        first = {alias: name for name, aliases in self._names.items() for alias in aliases}
        bases, buffers, found = self._bases(), dict(self.base.named_buffers(remove_duplicate=False)), dict[str, Tensor]()
        for name in vector.names:
            where = f"LinearizedModel: {doing}: {name!r}"
            if name not in buffers:
                raise KeyError(f"{where}: the model has no such parameter")
            delta = vector[name]
            if name not in first:
                if bool(delta.any()):
                    raise ValueError(f"{where}: is no parameter of the model but a buffer, which keeps the base's values; leave it out")
                continue
            base = bases[first[name]]
            if delta.shape != base.shape:
                raise ValueError(f"{where}: expected shape {tuple(base.shape)}, got {tuple(delta.shape)}")
            delta = delta.to(base.device, tau_dtype(base.dtype))
            earlier = found.setdefault(first[name], delta)
            if earlier is not delta and not torch.equal(earlier, delta):
                raise ValueError(f"{where}: is tied to {first[name]!r}, but the vector has different deltas of them")
        return {name: found[name] if name in found else torch.zeros_like(base) for name, base in bases.items()}

    @torch.no_grad()
    def apply_task_vector_(self, vector: TaskVector, alpha: float = 1.0) -> Self:
        """Add ``alpha`` times a task vector to p, and so to tau, in place.

        Parameters
        ----------
        vector
            Linear; an ordinary one is converted by ``as_regime("linear")``, which is post-hoc linearisation. Parameters that it has no
            delta of stay as they are.
        alpha
            Default 1.

        Raises
        ------
        KeyError
            If the model lacks a parameter that the vector has.
        TypeError
            If it is no task vector.
        ValueError
            If it is of the other regime, ``alpha`` is not finite, shapes differ, a tied parameter has two deltas, or one of a buffer (such
            as running statistics) is not zero. On an error the model is unchanged.
        """
        if not math.isfinite(alpha):
            raise ValueError(f"LinearizedModel: apply_task_vector_: alpha: expected a finite number, got {alpha}")
        deltas = self._checked(vector, "apply_task_vector_")
        for name, tau in self._taus().items():
            tau.add_(deltas[name], alpha=alpha)
        return self

    def decay_whole_weights(self, optimizer: Optimizer, *, decoupled: bool | None = None) -> RemovableHandle:
        """Make an optimizer's weight decay pull ``p = p0 + tau`` to zero, as in ordinary fine-tuning.

        The optimizer holds tau, so its own decay pulls tau to zero and p to the base, which is another method. This adds what is missing
        to every step: ``lr * weight_decay * p0`` after the step where the decay is decoupled (AdamW), and ``weight_decay * p0`` to
        the gradient before it elsewhere (SGD). Without weight decay it does nothing.

        Parameters
        ----------
        optimizer
            Over parameters of this model.
        decoupled
            Which of the two the optimizer does. Default None: known for torch's own optimizers.

        Returns
        -------
        RemovableHandle
            Its ``remove()`` undoes this.

        Raises
        ------
        TypeError
            If ``decoupled`` is None and the optimizer is none of torch's.
        ValueError
            If none of its parameters is this model's, as where a sharding wrapper has replaced them.
        RuntimeError
            At a step: under a fused optimizer with a GradScaler, or with a closure where the decay is added to the gradient.

        Notes
        -----
        Call it once per optimizer and model; twice is twice the decay. What an optimizer makes of the weights besides (Adafactor's steps
        are of the size of the tensor, ASGD has a decay of its own, which is why it has to be asked for) it makes of tau.
        """

        def bases() -> dict[nn.Parameter, Tensor]:
            own = self._bases()
            return {tau: own[name] for name, tau in self._taus().items()}

        return decay_whole_weights(optimizer, bases, decoupled)
