"""Time of routers, forward and with backward: ours beside torch eager, torch.compile in two modes and transformers' own functions.

python benchmarks/bench_topk_gate.py --json benchmarks/results/topk-gate-NAME.json

Times are taken in one process, form after form in every round. A form that cannot run here is left out, and named.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import environment
import taskloom
from harness import check_close
from inputs import weights
from optional import optional
from routers import CHOSEN, DEEPSEEK, GROUPS, KEPT_GROUPS, deepseek_router, softmax_router
from spread import summary

# Tokens, experts, and whether they are chosen in groups.
CASES = {"4096 x 128": (4096, 128, False), "4096 x 256": (4096, 256, False), "4096 x 256 in groups": (4096, 256, True)}
COMPILED = {"compiled": "default", "compiled, max-autotune": "max-autotune-no-cudagraphs"}
Router = Callable[[Tensor], tuple[Tensor, Tensor]]


def _ours(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"renormalize": True} if bias is None else DEEPSEEK
    gate = taskloom.topk_gate(logits, CHOSEN, bias, **options)
    return gate.weight, gate.ids


def _transformers(experts: int, bias: Tensor | None) -> Router | None:
    """The function of transformers that routes: it multiplies by the router's weight too, which is the identity here."""
    if optional("transformers") is None:
        return None
    if bias is None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

        config = Qwen3MoeConfig(num_experts=experts, num_experts_per_tok=CHOSEN, hidden_size=experts, norm_topk_prob=True)
        router = Qwen3MoeTopKRouter(config)
        with torch.no_grad():
            router.weight.copy_(torch.eye(experts))
        return lambda logits: router.to(logits.dtype)(logits)[1:]
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    config = DeepseekV3Config(
        n_routed_experts=experts,
        num_experts_per_tok=CHOSEN,
        hidden_size=experts,
        n_group=GROUPS,
        topk_group=KEPT_GROUPS,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    router = modeling_deepseek_v3.DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
        router.e_score_correction_bias.copy_(bias)
    return lambda logits: router(logits)[1:]


def forms(experts: int, bias: Tensor | None) -> dict[str, Router]:
    """Every way to route, by name."""
    eager: Router = softmax_router if bias is None else partial(deepseek_router, bias=bias)
    found: dict[str, Router] = {"ours": partial(_ours, bias=bias), "eager": eager}
    found |= {name: torch.compile(eager, mode=mode) for name, mode in COMPILED.items()}
    theirs = _transformers(experts, bias)
    return found if theirs is None else found | {"transformers": theirs}


def both(router: Router, leaf: Tensor, slopes: Tensor) -> Tensor:
    """The gradient of the logits, forward included."""
    weight = router(leaf)[0]
    return torch.autograd.grad(weight, leaf, slopes.to(weight.dtype))[0]


def _over_experts(logits: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros(logits.shape, dtype=weight.dtype).scatter(1, ids.long(), weight)


def _check(routers: dict[str, Router], logits: Tensor) -> None:
    """Raise unless all give the same weights, in float32 to the same experts: other dtypes make ties, which torch breaks as it likes."""
    with torch.no_grad():
        weight, ids = routers["ours"](logits)
        for name, router in routers.items():
            theirs, their_ids = router(logits)
            tolerance = 1e-5 if theirs.dtype == torch.float32 else 1e-2
            ordered = theirs.sort(dim=1).values.to(weight.dtype)
            check_close(weight.sort(dim=1).values, ordered, tolerance=tolerance)
            if logits.dtype == torch.float32:
                check_close(_over_experts(logits, weight, ids), _over_experts(logits, theirs, their_ids), tolerance=1e-5)
            print(f"  {name}: agrees", flush=True)


def measure(case: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of every form, and their ratio to ours in the same round."""
    tokens, experts, grouped = CASES[case]
    logits, slopes = weights((tokens, experts), 0, dtype), weights((tokens, CHOSEN), 2)
    routers = forms(experts, weights((experts,), 1) * 0.1 if grouped else None)
    _check(routers, logits)
    leaf = logits.clone().requires_grad_()
    found: dict[str, Any] = {"case": case, "dtype": str(dtype).removeprefix("torch.")}
    for call in ("forward", "both"):
        taken: dict[str, list[float]] = {form: [] for form in routers}
        for place in range(rounds + 2):
            for form, router in routers.items():
                begin = time.perf_counter()
                if call == "forward":
                    with torch.no_grad():
                        router(logits)
                else:
                    both(router, leaf, slopes)
                if place >= 2:
                    taken[form].append(time.perf_counter() - begin)
        found[call] = {
            form: {
                "seconds": summary(taken[form]),
                "over_ours": summary([theirs / own for theirs, own in zip(taken[form], taken["ours"], strict=True)]),
            }
            for form in routers
        }
    return found


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    surroundings = {
        "device": environment.device(),
        "versions": environment.versions(),
        "threads": torch.get_num_threads(),
        **environment.commit(),
    }
    rows = []
    for case in options.cases:
        for dtype in options.dtypes:
            row = measure(case, getattr(torch, dtype), options.rounds)
            rows.append(row)
            for call in ("forward", "both"):
                for form, one in row[call].items():
                    wall, ratio = one["seconds"]["median"], one["over_ours"]["median"]
                    print(f"{case:>22} {dtype:9}{call:8}{form:24}{1e3 * wall:9.2f} ms {ratio:6.1f} x", flush=True)
            if options.json:
                options.json.write_text(json.dumps(surroundings | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
