"""Normalisation behind slim layers: statistics for each width, calibrated for each configuration, or of no batch at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskloom.nn.slim_widths import SlimLayer, Width, active_channels
from taskloom.ops import prefix_norm
from taskloom.ops.routed._conv_checks import check_integer
from taskloom.ops.routed.prefix_norm import KINDS, normalise

_CALIBRATED = "calibrated."


class _Average:
    """Statistics of batches, averaged with equal weights; torch's BatchNorm does so where its momentum is None."""

    def __init__(self) -> None:
        self.batches = 0
        self.mean: Tensor | None = None
        self.var: Tensor | None = None

    def add(self, mean: Tensor, var: Tensor) -> None:
        self.batches += 1
        if self.mean is None or self.var is None:
            self.mean, self.var = mean.clone(), var.clone()
        else:
            self.mean.lerp_(mean, 1 / self.batches)
            self.var.lerp_(var, 1 / self.batches)


class SlimNorm2d(SlimLayer):
    """Normalisation of the active channels of a layer, ``[N, c, ...]``, with an optional ReLU fused behind it.

    Parameters
    ----------
    num_features
        The whole layer's channels C.
    kind
        ``"batch"`` (default); or ``"layer"`` or ``"group"``, whose statistics are each sample's own, so that there is nothing to calibrate:
        over all active channels and positions, or over groups of ``num_features / groups`` channels, as many as are active.
    groups
        For ``"group"``: the groups of the whole layer. Default 1.
    widths
        For ``"batch"``: further widths, ratios or integers of channels, that have parameters and running statistics of their own
        ("switchable"). Default None: weight and bias are shared by all widths, and each configuration is calibrated ("universal").
    eps, momentum, affine, device, dtype
        As nn.BatchNorm2d takes them. Defaults 1e-5, 0.1, True.
    relu
        Whether the positive part is taken. Default False.
    divisor
        What channels of a ratio in ``widths`` are a multiple of (:func:`make_divisible`). Default 8.

    Notes
    -----
    Parameters and buffers have the names of nn.BatchNorm2d's (``"batch"``) or nn.GroupNorm's, and state dicts are exchanged both ways as
    long as there are no other widths or calibrated statistics to be kept: these have names of their own beside them. A plain checkpoint
    gives every width in ``widths`` its first channels.

    ``"batch"`` in training uses the batch's statistics. At full width it is nn.BatchNorm2d. A universal layer has no statistics for other
    configurations until :func:`calibrate` took them, nor after the weights were trained further: evaluation then raises RuntimeError.
    They are kept for the configuration that :func:`use_width` says; where widths are given call by call, for the layer's own width.

    Source: switchable, Yu et al., ICLR 2019, arXiv 1812.08928; universal, Yu and Huang, ICCV 2019, arXiv 1903.05134.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        kind: str = "batch",
        *,
        groups: int = 1,
        widths: Sequence[Width] | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        relu: bool = False,
        divisor: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"SlimNorm2d: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if kind != "batch" and widths is not None:
            raise ValueError(f"SlimNorm2d: widths: expected None for kind {kind!r}, which has no statistics to keep, got {widths}")
        check_integer("SlimNorm2d", "groups", groups)
        if (kind != "group" and groups != 1) or groups < 1 or num_features % groups:
            raise ValueError(f"SlimNorm2d: groups: expected a divisor of {num_features} channels (1 unless kind is 'group'), got {groups}")
        self.num_features, self.kind, self.groups, self.eps, self.momentum, self.relu = num_features, kind, groups, eps, momentum, relu
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, start in (("weight", torch.ones), ("bias", torch.zeros)):
            self.register_parameter(name, nn.Parameter(start(num_features, **like)) if affine else None)
        if kind == "batch":
            self.register_buffer("running_mean", torch.zeros(num_features, **like))
            self.register_buffer("running_var", torch.ones(num_features, **like))
            self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        self.narrow: nn.ModuleDict | None = None
        if widths is not None:
            if not isinstance(widths, Sequence):
                raise TypeError(f"SlimNorm2d: widths: expected a sequence of ratios or integers, got {type(widths).__name__}")
            counts = {active_channels("SlimNorm2d: widths", width, num_features, divisor) for width in widths} - {num_features}
            norms = {str(count): nn.BatchNorm2d(count, eps, momentum, affine, **like) for count in sorted(counts)}
            self.narrow = nn.ModuleDict(norms)
        self.calibrated: dict[str, tuple[Tensor, Tensor]] = {}
        self._average: _Average | None = None

    def _own(self, channels: int) -> Any:
        """What has the parameters and running statistics of a width: the layer itself, or one of its further widths."""
        if self.narrow is None or channels == self.num_features:
            return self
        if str(channels) not in self.narrow:
            known = ", ".join((*self.narrow, str(self.num_features)))
            raise ValueError(f"SlimNorm2d: x: expected one of the widths {known}, which have statistics, got {channels} channels")
        return self.narrow[str(channels)]

    def _name(self, channels: int) -> str | None:
        """The name of what a universal layer runs at; None for full width, whose statistics are the running ones."""
        if self.configuration is not None:
            return self.configuration
        return None if channels == self.num_features else f"{channels} channels"

    def active_groups(self, channels: int) -> int:
        """The groups that active channels make; raise ValueError where they would cut one."""
        size = self.num_features // self.groups if self.kind == "group" else channels
        if channels % size:
            raise ValueError(f"SlimNorm2d: x: expected a multiple of the {size} channels of a group, got {channels}")
        return channels // size

    def statistics(self, channels: int) -> tuple[Tensor, Tensor]:
        """Mean and variance that evaluation at this width, in the current configuration, uses.

        Raises
        ------
        RuntimeError
            If there are none.
        """
        own, name = self._own(channels), self._name(channels)
        if self.narrow is None and name is not None:
            if name not in self.calibrated:
                raise RuntimeError(
                    f"SlimNorm2d: the configuration {name} was not calibrated (or was before training): use taskloom.nn.calibrate"
                )
            return self.calibrated[name]
        if own is not self and own.num_batches_tracked == 0:
            raise RuntimeError(f"SlimNorm2d: the width of {channels} channels has no statistics: train or use taskloom.nn.calibrate")
        return own.running_mean, own.running_var

    def forward(self, x: Tensor) -> Tensor:
        """The active channels x ``[N, c, ...]``, normalised."""
        channels = x.shape[1]
        if channels > self.num_features:
            raise ValueError(f"SlimNorm2d: x: expected at most {self.num_features} channels, got {channels}")
        if self.kind != "batch":
            settings: dict[str, Any] = {"kind": self.kind, "groups": self.active_groups(channels)}
            return prefix_norm(x, self.weight, self.bias, eps=self.eps, relu=self.relu, **settings)
        own = self._own(channels)
        if not self.training and self._average is None:
            mean, var = self.statistics(channels)
            return normalise(x, own.weight, own.bias, "batch", 1, mean, var, self.eps, self.relu)[0]
        y, mean, var = normalise(x, own.weight, own.bias, "batch", 1, None, None, self.eps, self.relu)
        count = x.shape[0] * x[:1, :1].numel()
        self._take(own, channels, mean.detach(), var.detach() * (count / (count - 1)))
        return y

    def _take(self, own: Any, channels: int, mean: Tensor, var: Tensor) -> None:
        """Keep a batch's statistics, the variance unbiased: for calibration, or as a training BatchNorm does."""
        if self._average is not None:
            self._average.add(mean, var)
            return
        self.calibrated.clear()
        if self.narrow is not None or self._name(channels) is None:
            own.num_batches_tracked.add_(1)
            share = 1 / float(own.num_batches_tracked) if self.momentum is None else self.momentum
            own.running_mean.lerp_(mean.to(own.running_mean.dtype), share)
            own.running_var.lerp_(var.to(own.running_var.dtype), share)

    def start_calibration(self) -> None:
        """Use batches' statistics and average them, until :meth:`end_calibration`."""
        self._average = _Average()

    def end_calibration(self, keep: bool = True) -> None:
        """Keep the average for the current configuration, where batches came."""
        average, self._average = self._average, None
        if not keep or average is None or average.mean is None or average.var is None:
            return
        channels = len(average.mean)
        own, name = self._own(channels), self._name(channels)
        if self.narrow is None and name is not None:
            self.calibrated[name] = (average.mean, average.var)
            return
        with torch.no_grad():
            own.running_mean.copy_(average.mean)
            own.running_var.copy_(average.var)
            own.num_batches_tracked.fill_(average.batches)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        layer: Any = super()
        layer._apply(fn, recurse)
        self.calibrated = {name: (fn(mean), fn(var)) for name, (mean, var) in self.calibrated.items()}
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, (mean, var) in self.calibrated.items():
            destination[f"{prefix}{_CALIBRATED}{name}.mean"], destination[f"{prefix}{_CALIBRATED}{name}.var"] = mean, var

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        found = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix + _CALIBRATED)}
        names = [key[len(prefix + _CALIBRATED) : -len(".mean")] for key in found if key.endswith(".mean")]
        if self.kind == "batch":
            like = self.num_batches_tracked
            start = prefix + _CALIBRATED
            self.calibrated = {
                name: (found[f"{start}{name}.mean"].to(like.device, copy=True), found[f"{start}{name}.var"].to(like.device, copy=True))
                for name in names
            }
        self._narrow_from_whole(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _narrow_from_whole(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Give widths that a plain checkpoint does not know the first channels of its layer, and no statistics."""
        if self.narrow is None or any(key.startswith(f"{prefix}narrow.") for key in state_dict):
            return
        for count, norm in self.narrow.items():
            for name, value in norm.state_dict().items():
                whole = state_dict.get(prefix + name)
                if name in ("weight", "bias") and whole is not None:
                    state_dict[f"{prefix}narrow.{count}.{name}"] = whole[: int(count)]
                else:
                    state_dict[f"{prefix}narrow.{count}.{name}"] = value

    def extra_repr(self) -> str:
        """Channels, kind and what is not the default."""
        parts = [str(self.num_features), self.kind]
        parts += [f"groups={self.groups}"] if self.kind == "group" else []
        return ", ".join(parts + ["relu=True"] * self.relu)
