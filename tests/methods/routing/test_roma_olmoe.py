"""The larger check: prompts, embeddings of all-MiniLM-L6-v2 and a small random OLMoE, from build_reference to tuned gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minilm_package import packaged_minilm
from moe_models import tiny_model
from taskloom.methods.routing.roma import (
    RoMAConfig,
    RoutingOverride,
    build_reference,
    c3po_reweight,
    manifold_loss,
    neighbor_weights,
    train_only_routers,
    tune_routers,
)
from taskloom.nn import patch_routers

pytestmark = pytest.mark.slow

LETTERS = ("a", "b")
# An instruction with its two answers, and what fits each.
QUESTIONS = [
    ("Is a {} an animal or a plant?", ("horse", "trout", "sparrow", "lizard"), ("oak", "fern", "tulip", "cactus")),
    ("Would you find {} in a kitchen or in an office?", ("a frying pan", "an oven", "a whisk"), ("a stapler", "a printer", "a whiteboard")),
    ("Is the number {} even or odd?", ("4", "18", "76", "32"), ("7", "13", "91", "55")),
    ("Does the word '{}' describe a happy or a sad mood?", ("cheerful", "delighted", "glad"), ("gloomy", "tearful", "miserable")),
    ("Is {} a city or a country?", ("Paris", "Tokyo", "Lima", "Cairo"), ("Norway", "Kenya", "Peru", "Japan")),
]


def _prompts() -> tuple[list[str], list[str], Tensor]:
    """Prompts, their answers, and the number of each one's instruction."""
    prompts, answers, instructions = [], [], []
    for place, (question, *fitting) in enumerate(QUESTIONS):
        for answer, words in zip(LETTERS, fitting, strict=True):
            for word in words:
                prompts.append(f"{question.format(word)} Answer with the letter {LETTERS[0]} for the first, {LETTERS[1]} for the second:")
                answers.append(answer)
                instructions.append(place)
    return prompts, answers, torch.tensor(instructions)


@torch.no_grad()
def _embeddings(folder: Path, prompts: list[str]) -> Tensor:
    """The mean over tokens, of unit norm, as the sentence encoder has it."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(prompts, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(folder, local_files_only=True).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(2)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def _batches(folder: Path, prompts: list[str], answers: list[str], size: int) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Prompt and answer, padded on the left, with labels for the answer alone; and the end of each prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batches, ends = [], []
    for begin in range(0, len(prompts), size):
        rows = [
            tokenizer(prompt)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]
            for prompt, answer in zip(prompts[begin : begin + size], answers[begin : begin + size], strict=True)
        ]
        length = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        labels = torch.where(torch.arange(length) == length - 1, ids, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        ends.append(torch.full((len(rows),), length - 2))
    return batches, ends


def _is_correct(batch: dict[str, Tensor], output: Any) -> Tensor:
    """Whether the answer's letter is likelier than the other."""
    letters = batch["labels"][:, -1].unique()
    chosen = letters[output.logits[:, -2, letters].argmax(1)]
    return chosen == batch["labels"][:, -1]


def test_from_prompts_to_tuned_gates() -> None:
    folder = packaged_minilm()
    prompts, answers, instructions = _prompts()
    emb = _embeddings(folder, prompts)
    torch.testing.assert_close(emb.norm(dim=1), torch.ones(len(prompts)))
    batches, ends = _batches(folder, prompts, answers, 12)
    where = {id(batch): end for batch, end in zip(batches, ends, strict=True)}
    model = tiny_model("olmoe", vocab_size=30522, hidden_size=48, intermediate_size=32, num_hidden_layers=4, max_position_embeddings=128)
    config = RoMAConfig(layers=-2, lam=5.0)

    def positions(batch: dict[str, Tensor]) -> Tensor:
        return where[id(batch)]

    reference = build_reference(model, batches, emb, _is_correct, config, positions=positions)
    assert 0 < len(reference.keys) < len(prompts)
    assert reference.experts == (8, 8)
    torch.testing.assert_close(reference.r.sum(1), torch.full((len(reference.keys),), 2.0))
    keys = torch.arange(len(prompts))
    neighbors = neighbor_weights(emb, reference, config, keys)
    same = instructions[reference.keys][neighbors.ids] == instructions[:, None]
    assert same.float().mean() > 0.9
    assert not (reference.keys[neighbors.ids] == keys[:, None]).any()

    before = {name: one.clone() for name, one in model.state_dict().items()}
    optimizer = torch.optim.AdamW(train_only_routers(model, config.layers), lr=1e-2)
    samples = keys.split(12)
    steps = list(zip(samples, batches, strict=True)) * 12
    patch_routers(model)
    losses = tune_routers(
        model,
        steps,
        lambda batch, output: output.loss,
        optimizer,
        config,
        reference=reference,
        neighbors=neighbors,
        positions=positions,
    )
    assert sum(losses[-len(batches) :]) < sum(losses[: len(batches)])
    changed = [name for name, one in model.state_dict().items() if not torch.equal(one, before[name])]
    assert changed == ["model.layers.2.mlp.gate.weight", "model.layers.3.mlp.gate.weight"]

    after = {name: one.clone() for name, one in model.state_dict().items()}
    distances = []
    for state in (before, after):
        model.load_state_dict(state)
        found = []
        with torch.no_grad(), config.recorder(model) as recorder:
            for rows, batch in zip(samples, batches, strict=True):
                recorder.positions = positions(batch)
                model(**batch)
                found.append(manifold_loss(recorder.r, reference.r, neighbors.ids[rows], neighbors.weight[rows]))
        distances.append(float(torch.cat(found).mean()))
    assert distances[1] < distances[0]


def test_c3po_routes_an_unseen_prompt_as_its_neighbours() -> None:
    folder = packaged_minilm()
    prompts, answers, instructions = _prompts()
    unseen = ["Is a dolphin an animal or a plant? Answer with the letter a for the first, b for the second:"]
    emb = _embeddings(folder, prompts + unseen)
    batches, _ = _batches(folder, prompts, answers, len(prompts))
    (query,), _ = _batches(folder, unseen, ["a"], 1)
    model = tiny_model("olmoe", vocab_size=30522, hidden_size=48, intermediate_size=32, num_hidden_layers=4, max_position_embeddings=128)
    config = RoMAConfig(layers=-2, exclude_self=False)
    reference = build_reference(model, batches, emb[:-1], _is_correct, config)
    ids, _ = neighbor_weights(emb[-1:], reference, config)
    assert (instructions[reference.keys][ids] == 0).all()
    similarity = (reference.emb[ids] @ emb[-1:].unsqueeze(2)).squeeze(2)
    r = c3po_reweight(reference.r[ids], similarity, reference.experts)
    with torch.no_grad(), RoutingOverride(model, r, config.layers):
        routed = model(**query, output_router_logits=True).router_logits
    last = torch.cat([logits.view(1, -1, 8)[:, -1].softmax(1) for logits in routed[-2:]], 1)
    torch.testing.assert_close(last, r, rtol=1e-5, atol=1e-6)
