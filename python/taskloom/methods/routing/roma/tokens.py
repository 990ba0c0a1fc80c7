"""Which row of a router's input is the token of each sequence that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

Token = Literal["last", "first"]
# The inputs that tell how many sequences a call has.
INPUTS = ("input_ids", "inputs_embeds")


def token_positions(attention_mask: Tensor, token: Token = "last") -> Tensor:
    """The position of each sequence's last (or first) token that is not padding, whichever side is padded.

    Parameters
    ----------
    attention_mask
        ``[B, S]``: 0 where there is padding.
    token
        ``"last"``, the default, or ``"first"``.

    Returns
    -------
    Tensor
        int64 ``[B]``.

    Raises
    ------
    ValueError
        If the mask has another shape, or a sequence is nothing but padding.
    """
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected shape (B, S), got {tuple(attention_mask.shape)}")
    seen = attention_mask != 0
    if not bool(seen.any(1).all()):
        raise ValueError("attention_mask: expected a token in each sequence, got one that is all padding")
    if token == "first":
        return seen.int().argmax(1)
    return seen.shape[1] - 1 - seen.flip(1).int().argmax(1)


class AskedTokens:
    """The tokens asked for in one call of a model.

    Parameters
    ----------
    args, kwargs
        The call's. ``attention_mask`` is looked for among ``kwargs``; the batch is that of the mask, or else of ``input_ids``,
        ``inputs_embeds`` or the first tensor.
    token
        Which token is meant.
    positions
        int64 ``[B]``: positions that are asked for instead. Default None.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], token: Token, positions: Tensor | None = None) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: expected a tensor of shape (B, S), got {shape}")
        named = [kwargs[name] for name in INPUTS if isinstance(kwargs.get(name), Tensor)]
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        if not tensors:
            raise ValueError("the model was called without a tensor, so that the number of sequences is not known")
        self.batch = len(mask) if mask is not None else len((named or tensors)[0])
        if positions is not None and positions.shape != (self.batch,):
            raise ValueError(f"positions: expected shape ({self.batch},), one for each sequence, got {tuple(positions.shape)}")
        self._mask, self._token, self._positions = mask, token, positions

    def rows(self, count: int, device: torch.device) -> Tensor:
        """The asked rows ``[B]`` among a router's ``count`` rows, sequence after sequence.

        With a cache of earlier tokens the mask is longer than what is routed, and its last part counts.

        Raises
        ------
        ValueError
            If the rows are no whole number of tokens per sequence, fewer than the mask, or a position is out of range.
        """
        tokens, rest = divmod(count, self.batch) if self.batch else (0, count)
        if rest or (self._mask is not None and tokens > self._mask.shape[1]):
            shape = f"{self.batch} sequences" if self._mask is None else f"an attention_mask {tuple(self._mask.shape)}"
            raise ValueError(f"a router had {count} rows in a call with {shape}; its rows have to be the tokens of the sequences in order")
        starts = torch.arange(self.batch, device=device) * tokens
        if self._positions is not None:
            positions = self._positions.to(device)
            if bool(((positions < 0) | (positions >= tokens)).any()):
                raise ValueError(f"positions: expected 0 to {tokens - 1}, got {positions.tolist()}")
        elif self._mask is not None:
            positions = token_positions(self._mask[:, self._mask.shape[1] - tokens :], self._token).to(device)
        else:
            positions = torch.full_like(starts, tokens - 1 if self._token == "last" else 0)
        return starts + positions
