"""What torch.compile needs to know of our Python, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_under_compile(function: _Function) -> _Function:
    """Let torch.compile call a function while it traces and keep the result as a constant.

    This is torch.compiler.assume_constant_result, which imports torch._dynamo: a second that a program without torch.compile need not
    spend.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function
