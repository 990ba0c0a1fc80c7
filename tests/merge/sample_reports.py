"""Reports that no merge had to run for."""

from __future__ import annotations

import random
from collections.abc import Sequence

from taskloom.merge.report import VERSION, Figures, FileReport, FingerprintReport, InputReport, MergeReport, TensorReport

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
)


def sample_figures(models: int, generator: random.Random) -> Figures:
    cosines: list[list[float | None]] = [[1.0] * models for _ in range(models)]
    for row in range(models):
        for column in range(row):
            cosines[row][column] = cosines[column][row] = generator.uniform(-0.2, 0.6)
    kept = [generator.uniform(0.2, 0.8) for _ in range(models)]
    norms: list[float | None] = [generator.lognormvariate(0, 1) for _ in range(models)]
    return Figures(kept, generator.random() * 0.3, norms, cosines)


def sample_report(
    models: Sequence[str] = ("org/math", "org/code"), layers: int = 3, modules: int = 3, prefix: str = "model.", method: str = "ties"
) -> MergeReport:
    """A report with ``layers * modules`` tensors in layers, one merged and one copied outside of them."""
    generator = random.Random(5)
    count = len(models)
    tensors = [
        TensorReport(f"{prefix}embed_tokens.weight", [320, 64], "BF16", None, 40960, 0.25, sample_figures(count, generator)),
        TensorReport(f"{prefix}position_ids", [1, 64], "I64", None, 512, 0.0, None),
    ]
    for layer in range(layers):
        for number in range(modules):
            name = f"{prefix}layers.{layer}.{MODULES[number % len(MODULES)]}{'' if number < len(MODULES) else number}.weight"
            tensors.append(TensorReport(name, [64, 64], "BF16", layer, 8192, 0.01 * (number + 1), sample_figures(count, generator)))
    return MergeReport(
        version=VERSION,
        output="/models/merged",
        method=method,
        base_model="org/base",
        models=list(models),
        seed=7,
        seconds=2.5,
        bytes_read=3_000_000_000,
        bytes_written=1_000_000_000,
        fingerprint=FingerprintReport("0123456789abcdef" * 2, "fedcba9876543210" * 2, False),
        inputs=[
            InputReport(model, f"/cache/{model}/model.safetensors", 1_000_000_000, 1, "ab" * 16, "cd" * 16)
            for model in ("org/base", *models)
        ],
        files=[FileReport("model.safetensors", 1_000_000_000, "cd" * 16)],
        total=sample_figures(count, generator),
        tensors=tensors,
        notes=["copied from org/base without merging: 'model.position_ids'"],
        versions={"taskloom": "0.1.0", "python": "3.11.2"},
    )
