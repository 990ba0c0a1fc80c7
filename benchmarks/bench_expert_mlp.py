"""Time of ExpertMLP beside transformers' own ways through one sparse block, in one run: its loop over experts, and its grouped product.

    python benchmarks/bench_expert_mlp.py [--json NAME.json] [--device cuda] [--dtype bfloat16] [--tokens 512]

All arms are OLMoE's sparse block with the same parameters. Ours is gated first: output and gradients have to be those of the loop.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import environment
from bench_weighted_ce import timed
from harness import check_close
from spread import spread, summary
from taskloom.nn import ExpertMLP

OURS, LOOP = "ExpertMLP", "transformers, loop"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Case:
    """Layers that share their parameters, and a batch."""

    arms: dict[str, nn.Module]
    x: Tensor
    gradient: Tensor

    @classmethod
    def make(cls, given: argparse.Namespace) -> Case:
        from transformers.models.olmoe import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

        torch.manual_seed(0)
        dtype = getattr(torch, given.dtype)
        sizes: dict[str, Any] = {
            "hidden_size": given.dim,
            "intermediate_size": given.hidden,
            "num_experts": given.experts,
            "num_experts_per_tok": given.k,
        }
        blocks = {}
        for name, way in ((LOOP, "eager"), ("transformers, grouped_mm", "grouped_mm")):
            config = OlmoeConfig(**sizes)
            config._experts_implementation = way
            blocks[name] = OlmoeSparseMoeBlock(config).to(given.device, dtype)
        first, second = blocks.values()
        for parameter in first.parameters():
            nn.init.normal_(parameter, std=0.05)
        for name, parameter in first.named_parameters():
            owner, _, last = name.rpartition(".")
            setattr(second.get_submodule(owner), last, parameter)
        x, gradient = (torch.randn(1, given.tokens, given.dim).to(given.device, dtype) for _ in range(2))
        return cls({OURS: ExpertMLP.from_transformers(first), **blocks}, x.requires_grad_(), gradient)


def gradients(case: Case, arm: str) -> list[Tensor]:
    """Of the batch and of all parameters, by their names."""
    layer = case.arms[arm]
    leaves = (case.x, layer.get_parameter("experts.gate_up_proj" if arm != OURS else "gate_up_proj"))
    leaves += (layer.get_parameter("experts.down_proj" if arm != OURS else "down_proj"),)
    leaves += (layer.get_parameter("gate.weight" if arm != OURS else "router.weight"),)
    return list(torch.autograd.grad(layer(case.x), leaves, case.gradient))


def gate(case: Case) -> None:
    """Raise unless our output and gradients are those of the loop."""
    tolerance = TOLERANCES[case.x.dtype]
    with torch.no_grad():
        check_close(case.arms[OURS](case.x), case.arms[LOOP](case.x), tolerance=tolerance)
    check_close(gradients(case, OURS), gradients(case, LOOP), tolerance=tolerance)


def _finished(case: Case, arm: str, backward: bool) -> Callable[[], Any]:
    def run() -> Any:
        with torch.set_grad_enabled(backward):
            result = gradients(case, arm) if backward else case.arms[arm](case.x)
        if case.x.is_cuda:
            torch.cuda.synchronize()
        return result

    return run


def measure(case: Case, backward: bool, rounds: int) -> dict[str, Any]:
    """Seconds of each arm, in turn, and how many times ours the others take, round by round."""
    calls = {arm: _finished(case, arm, backward) for arm in case.arms}
    for call in calls.values():
        call()
    taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in calls}
    for number in range(rounds):
        for arm in list(calls)[:: 1 if number % 2 == 0 else -1]:
            taken[arm].append(timed(calls[arm]))
    wall, processor = ({arm: [one[place] for one in pairs] for arm, pairs in taken.items()} for place in range(2))
    return {
        "seconds": {arm: summary(one) for arm, one in wall.items()},
        "over_ours": {arm: summary([a / b for a, b in zip(one, wall[OURS], strict=True)]) for arm, one in wall.items()},
        "cpu_over_ours": {arm: summary([a / b for a, b in zip(one, processor[OURS], strict=True)]) for arm, one in processor.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="ExpertMLP beside transformers' ways through the same block.")
    parser.add_argument("--json", type=Path, help="file to keep the figures in, under benchmarks/results")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=[str(dtype).removeprefix("torch.") for dtype in TOLERANCES])
    for name, value in (("dim", 512), ("hidden", 256), ("experts", 64), ("k", 8), ("tokens", 512), ("rounds", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    case = Case.make(given)
    gate(case)
    sizes = {name: getattr(given, name) for name in ("device", "dtype", "dim", "hidden", "experts", "k", "tokens")}
    record: dict[str, Any] = {"sizes": sizes, "threads": torch.get_num_threads()}
    for name, backward in (("forward", False), ("both", True)):
        record[name] = found = measure(case, backward, given.rounds)
        print(name)
        for arm, seconds in found["seconds"].items():
            ratio = f"{spread(found['over_ours'][arm])} of ours, processor time {spread(found['cpu_over_ours'][arm])}"
            print(f"  {arm:<26}{1e3 * seconds['median']:9.2f} ms, {ratio}", flush=True)
    if given.json:
        facts = environment.device() | ({} if given.device == "cpu" else {"gpu": torch.cuda.get_device_name()})
        record = {"device": facts, "versions": environment.versions(), "commit": environment.commit(), **record}
        path = Path(__file__).parent / "results" / given.json.name
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
