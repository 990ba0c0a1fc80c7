"""Output heads that share the embedding's weights, and so are stored in some checkpoints and left out of others."""

from __future__ import annotations

from collections.abc import Mapping

from taskloom.merge.checkpoint import Checkpoint

# A head and the embeddings that a model may tie it to, by the names that transformers' architectures use.
_EMBEDDINGS: Mapping[str, tuple[str, ...]] = {
    "lm_head.weight": (
        "model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "transformer.wte.weight",
        "wte.weight",
        "shared.weight",
        "model.shared.weight",
        "model.decoder.embed_tokens.weight",
        "transformer.embd.wte.weight",
        "transformer.word_embeddings.weight",
        "backbone.embeddings.weight",
        "backbone.embedding.weight",
        "roberta.embeddings.word_embeddings.weight",
    ),
    "language_model.lm_head.weight": ("language_model.model.embed_tokens.weight",),
    "embed_out.weight": ("gpt_neox.embed_in.weight",),
    "cls.predictions.decoder.weight": ("bert.embeddings.word_embeddings.weight",),
    "cls.predictions.decoder.bias": ("cls.predictions.bias",),
    "lm_head.decoder.weight": ("roberta.embeddings.word_embeddings.weight",),
    "lm_head.decoder.bias": ("lm_head.bias",),
    "vocab_projector.weight": ("distilbert.embeddings.word_embeddings.weight",),
    "encoder.embed_tokens.weight": ("shared.weight",),
    "decoder.embed_tokens.weight": ("shared.weight",),
    "model.encoder.embed_tokens.weight": ("model.shared.weight",),
    "model.decoder.embed_tokens.weight": ("model.shared.weight",),
}


def ties_embeddings(checkpoint: Checkpoint) -> bool:
    """Whether a model's config.json ties its head to its embedding.

    transformers writes the key where a model does not tie; a config without it means tied. Without a config.json nothing is assumed.
    """
    config = checkpoint.config
    if config is None:
        return False
    nested = config.get("text_config")
    inner = nested.get("tie_word_embeddings") if isinstance(nested, dict) else None
    found = config.get("tie_word_embeddings", inner)
    return True if found is None else bool(found)


def tied_embedding(checkpoint: Checkpoint, head: str, shape: tuple[int, ...]) -> str | None:
    """The name of the tensor that ``head`` of ``shape`` shares its values with in this model; None where the model does not tie it."""
    if not ties_embeddings(checkpoint):
        return None
    for name in _EMBEDDINGS.get(head, ()):
        entry = checkpoint.tensors.get(name)
        if entry is not None and entry.shape == shape:
            return name
    return None


def is_tied_copy(checkpoint: Checkpoint, head: str) -> bool:
    """Whether ``head`` is in this model only as a second copy of an embedding that its config ties it to."""
    return head in checkpoint.tensors and tied_embedding(checkpoint, head, checkpoint.tensors[head].shape) is not None
