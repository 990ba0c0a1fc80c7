"""A DiT block's forward and backward: plain, masked as the official DTR code has it, and by window_norm_linear; one run, round by round.

``python benchmarks/bench_dtr_block.py --channels 1024 --out NAME.json`` prints the medians of each way's time over the plain block's, and
writes them with the sizes. docs/routed.md says what they mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import taskloom
from environment import commit, device, versions
from harness import check_close, seconds_of
from spread import summary

HEADS, SHARE = 16, 0.8


class Block:
    """The weights of one block of width C, and its parts by the names of the official code."""

    def __init__(self, channels: int) -> None:
        torch.manual_seed(0)
        scale = channels**-0.5
        sizes = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}
        self.weights = {name: scale * torch.randn(out * channels, into * channels) for name, (out, into) in sizes.items()}
        for weight in self.weights.values():
            weight.requires_grad_()

    def attended(self, qkv: Tensor, gate: Tensor) -> Tensor:
        """What the first sub-layer adds, from queries, keys and values on."""
        samples, tokens, channels = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = qkv.reshape(samples, tokens, 3, HEADS, channels // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(samples, tokens, channels)
        return gate[:, None] * F.linear(mixed, self.weights["proj"])

    def transformed(self, z: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """What the second sub-layer adds."""
        inner = F.gelu(F.linear(modulated(z, shift, scale), self.weights["fc1"]), approximate="tanh")
        return gate[:, None] * F.linear(inner, self.weights["fc2"])


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm and modulation as DiT has it."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def ways(block: Block, x: Tensor, chunks: list[Tensor], start: Tensor, width: int) -> Mapping[str, Callable[[], Tensor]]:
    """Each way's output, by name; the plain block sees all channels."""
    place = torch.arange(x.shape[2])
    mask = ((place >= start[:, None]) & (place < start[:, None] + width)).to(x.dtype)[:, None]

    def plain() -> Tensor:
        z = x + block.attended(F.linear(modulated(x, *chunks[:2]), block.weights["qkv"]), chunks[2])
        return z + block.transformed(z, *chunks[3:])

    def masked() -> Tensor:
        z = mask * x
        z = z + block.attended(F.linear(modulated(z, *chunks[:2]), block.weights["qkv"]), chunks[2])
        return z + block.transformed(z, *chunks[3:]) + (1 - mask) * x

    def from_qkv(qkv: Tensor) -> Tensor:
        added = block.attended(qkv, chunks[2])
        # The second norm sees the masked input too, beside what was added.
        return x + added + block.transformed(torch.addcmul(added, mask, x), *chunks[3:])

    def routed() -> Tensor:
        return from_qkv(taskloom.window_norm_linear(x, block.weights["qkv"], None, *chunks[:2], start=start, width=width))

    def normed() -> Tensor:
        u = taskloom.window_layer_norm(x, *chunks[:2], start=start, width=width)
        return from_qkv(F.linear(u, block.weights["qkv"]))

    return {"plain": plain, "masked": masked, "window_norm_linear": routed, "window_layer_norm, dense product": normed}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    sizes = parser.parse_args()
    x = torch.randn(sizes.samples, sizes.tokens, sizes.channels).requires_grad_()
    chunks = [0.1 * one for one in torch.randn(6, sizes.samples, sizes.channels)]
    width = int(SHARE * sizes.channels)
    start = torch.randint(0, sizes.channels - width + 1, (sizes.samples,), generator=torch.Generator().manual_seed(0))
    calls = ways(Block(sizes.channels), x, chunks, start, width)
    with torch.no_grad():
        for name in list(calls)[2:]:
            check_close(calls[name](), calls["masked"](), tolerance=1e-5)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(sizes.rounds + 1):
        for name, call in calls.items():
            seconds = seconds_of(lambda call=call: call().sum().backward())
            if number:
                taken[name].append(seconds)
    over_plain = {name: summary([own / plain for own, plain in zip(times, taken["plain"], strict=True)]) for name, times in taken.items()}
    for name, found in over_plain.items():
        print(f"{name:34s} {found['median']:.3f} of the plain block's time ({found['lowest']:.3f} to {found['highest']:.3f})")
    if sizes.out is not None:
        given = {"samples": sizes.samples, "tokens": sizes.tokens, "channels": sizes.channels, "width": width}
        sizes.out.write_text(
            json.dumps({"device": device(), "versions": versions(), "commit": commit(), "sizes": given, "over_plain": over_plain}, indent=1)
        )


if __name__ == "__main__":
    main()
