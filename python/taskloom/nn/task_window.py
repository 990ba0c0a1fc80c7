"""A window of channels for each task, and residual blocks whose branch sees the window of each sample's task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from taskloom.ops.routed._conv_checks import check_integer
from taskloom.ops.routed._windows import INTEGERS, check_values, window_of
from taskloom.reference.routed.windows import window_mask


def _check_integers(name: str, table: Tensor) -> None:
    if not isinstance(table, Tensor) or table.dtype not in INTEGERS:
        raise TypeError(f"TaskWindow: {name}: expected a tensor of integers, got {getattr(table, 'dtype', type(table).__name__)}")


class TaskWindow(nn.Module):
    """The window of channels of each task, looked up in a table.

    Where the windows lie is a method's choice (``taskloom.methods.channels`` has denoising task routing's); this is its table. The
    tables are buffers that move with the model and are not saved: they are made anew from the method's settings. A model that leaves the
    meta device (``to_empty``) has them again.

    Parameters
    ----------
    start
        Integers ``[T]``: the first channel of each task's window.
    width
        The number of channels of every window, or integers ``[T]``.
    channels
        Channels that the windows lie in.

    Raises
    ------
    TypeError
        If a table does not hold integers.
    ValueError
        If a table has another shape or no task, or a window has no channel or leaves the channels.

    Attributes
    ----------
    num_tasks, channels
        Sizes.
    """

    start: Tensor
    width: Tensor | None

    def __init__(self, start: Tensor, width: Tensor | int, channels: int) -> None:
        super().__init__()
        _check_integers("start", start)
        for name, one in (("width", width), ("channels", channels)):
            if name == "channels" or not isinstance(one, Tensor):
                check_integer("TaskWindow", name, one)
            else:
                _check_integers(name, one)
        if start.dim() != 1 or not len(start):
            raise ValueError(f"TaskWindow: start: expected shape (T,) with at least one task, got {tuple(start.shape)}")
        if isinstance(width, Tensor) and width.shape != start.shape:
            raise ValueError(f"TaskWindow: width: expected shape {tuple(start.shape)} as start, got {tuple(width.shape)}")
        begin = start.detach().long()
        widths = torch.as_tensor(width, device=begin.device).long().expand(len(begin))
        wrong = (begin < 0) | (widths < 1) | (begin > channels - widths)
        if bool(wrong.any()):
            task = int(wrong.int().argmax())
            raise ValueError(
                f"TaskWindow: start: expected windows of at least 1 channel within {channels}, got start {int(begin[task])} and width "
                f"{int(widths[task])} for task {task}"
            )
        self.num_tasks, self.channels = len(begin), channels
        self._one_width = int(widths[0]) if bool((widths == widths[0]).all()) else None
        self._tables = {"start": begin.int().cpu()}
        if self._one_width is None:
            self._tables["width"] = widths.int().cpu()
        for name in ("start", "width"):
            table = self._tables.get(name)
            self.register_buffer(name, None if table is None else table.to(begin.device, copy=True), persistent=False)

    def forward(self, task: Tensor) -> tuple[Tensor, Tensor | int]:
        """The windows of tasks: (start, width), as the routed ops take them.

        Parameters
        ----------
        task
            Integers from 0 to T - 1, ``[N]`` or ``[]``.

        Returns
        -------
        tuple
            start, int32 of task's shape, and width: one number where every task's is the same, else int32 of task's shape.

        Raises
        ------
        TypeError
            If task does not hold integers.
        IndexError
            If a task is outside of 0 to T - 1. On a GPU that is a device-side assertion, as in torch's own indexing, and negative numbers
            count from the end.
        """
        if not isinstance(task, Tensor) or task.dtype not in INTEGERS:
            raise TypeError(f"TaskWindow: task: expected integers, got {task.dtype if isinstance(task, Tensor) else type(task).__name__}")
        if task.is_cpu and not torch.compiler.is_compiling() and task.numel():
            least, most = (int(one) for one in torch.aminmax(task))
            if least < 0 or most >= self.num_tasks:
                raise IndexError(f"TaskWindow: task: expected 0 to {self.num_tasks - 1}, got {least if least < 0 else most}")
        places = task.long()
        if self.width is None:
            assert self._one_width is not None
            return self.start[places], self._one_width
        return self.start[places], self.width[places]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        without_data = self.start.is_meta
        module: Any = super()
        module._apply(fn, recurse)
        # No state dict fills them after to_empty.
        if without_data and not self.start.is_meta:
            for name, table in self._tables.items():
                setattr(self, name, table.to(self.start.device, copy=True))
        return self

    def extra_repr(self) -> str:
        """What the layer's line shows."""
        width = "of several widths" if self._one_width is None else f"width={self._one_width}"
        return f"num_tasks={self.num_tasks}, channels={self.channels}, {width}"


class RoutedResidual(nn.Module):
    """A residual block whose branch sees the window of each sample's task: ``x + branch(mask * x)``. The identity path is not masked.

    Parameters
    ----------
    branch
        What is added. A layer with ``takes_window`` (:class:`WindowLinear`, :class:`WindowConv2d`), or a ``nn.Sequential`` that begins with
        one, is given x and the window, and no masked copy is made; hooks of the ``nn.Sequential`` itself are not called then, those of its
        modules are. Any other module is called with a copy of x that is 0 outside the windows.
    window
        Tasks to (start, width), such as a :class:`TaskWindow`; or to the mask itself, bool ``[N, C]``, such as the random channels of
        ``taskloom.methods.channels.dtr.RandomRouting``, for a branch that does not take windows.
    channel_dim
        Where x has its channels. Default -1; 1 for images.

    Raises
    ------
    ValueError
        In a call, if windows do not fit x: another number of samples, or of channels along ``channel_dim``.

    Notes
    -----
    Source: equation of denoising task routing, Park et al., ICLR 2024, arXiv 2310.07138, section 4.
    """

    def __init__(self, branch: nn.Module, window: nn.Module, channel_dim: int = -1) -> None:
        super().__init__()
        self.branch, self.window, self.channel_dim = branch, window, channel_dim

    def forward(self, x: Tensor, task: Tensor, *args: Any) -> Tensor:
        """``x + branch(mask * x, *args)``.

        Parameters
        ----------
        x
            ``[N, ..., C]``, or with channels along ``channel_dim``.
        task
            Integers ``[N]``, or ``[]`` for all samples.
        *args
            What else the branch takes.

        Raises
        ------
        TypeError
            If the window gives a mask, and the branch takes windows.
        ValueError
            If the mask has another shape.
        """
        found = self.window(task)
        first, *rest = self._steps()
        takes_window = getattr(first, "takes_window", False)
        if not takes_window:
            self._check_channels(x)
        if isinstance(found, Tensor):
            if takes_window:
                raise TypeError(f"RoutedResidual: window: expected windows for {type(first).__name__}, got a mask")
            return x + cast(Tensor, self.branch(_kept(x, found, self.channel_dim), *args))
        start, width = found
        if not takes_window:
            return x + cast(Tensor, self.branch(masked(x, start, width, self.channel_dim), *args))
        made = first(x, start, width, *args)
        for module in rest:
            made = module(made)
        return x + cast(Tensor, made)

    def _steps(self) -> list[nn.Module]:
        """What is called one after the other; not children(), which leaves out a module that comes again."""
        branch = self.branch
        # A class with a forward of its own is called as it is.
        if isinstance(branch, nn.Sequential) and type(branch).forward is nn.Sequential.forward and len(branch):
            return list(branch)
        return [branch]

    def _check_channels(self, x: Tensor) -> None:
        """Raise where the windows are of other channels than x has along ``channel_dim``."""
        if x.dim() < 2 or self.channel_dim == 0 or not -x.dim() < self.channel_dim < x.dim():
            where = f"samples and, along dimension {self.channel_dim}, channels"
            raise ValueError(f"RoutedResidual: x: expected {where}, got {tuple(x.shape)}")
        channels = getattr(self.window, "channels", None)
        if channels is not None and x.shape[self.channel_dim] != channels:
            where = f"the window's {channels} channels along dimension {self.channel_dim} (channel_dim)"
            raise ValueError(f"RoutedResidual: x: expected {where}, got {tuple(x.shape)}")


def masked(x: Tensor, start: Tensor | int, width: Tensor | int, channel_dim: int) -> Tensor:
    """A copy of x that is 0 outside each sample's window; raises where windows do not fit x."""
    op, channels = "RoutedResidual", x.shape[channel_dim]
    window = window_of(op, len(x), channels, start, width, x)
    if window[0].is_cpu and not torch.compiler.is_compiling():
        check_values(op, len(x), channels, window)
    return _kept(x, window_mask(len(x), channels, *window), channel_dim)


def _kept(x: Tensor, seen: Tensor, channel_dim: int) -> Tensor:
    """A copy of x that is 0 where a mask, bool ``[N, C]`` or ``[1, C]`` for all samples, is not set."""
    if seen.dtype != torch.bool or seen.dim() != 2 or seen.shape[1] != x.shape[channel_dim] or seen.shape[0] not in (1, len(x)):
        raise ValueError(
            f"RoutedResidual: window: expected a mask of bools ({len(x)}, {x.shape[channel_dim]}), got {seen.dtype} {tuple(seen.shape)}"
        )
    shape = [1] * x.dim()
    shape[0], shape[channel_dim] = seen.shape
    return x.masked_fill(~seen.view(shape), 0)
