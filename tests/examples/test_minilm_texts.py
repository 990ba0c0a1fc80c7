"""The example's texts: balanced, repeatable, and nothing of a test text was seen in training."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import get_args

import pytest

from minilm_tasks import FULL, QUICK, Settings
from minilm_texts import NEUTRAL, TASKS, SplitName, TextTask, deal, make_split

SPLITS: tuple[SplitName, ...] = get_args(SplitName)
SLOT = re.compile(r"\{(\w+)\}")
IDS = [task.name for task in TASKS]


def _pattern(phrase: str, task: TextTask, split: SplitName) -> str:
    """What a phrase may become in a split, written without the generator."""
    pieces = re.split(r"\{(\w+)\}", phrase)
    return "".join(
        "(?:" + "|".join(map(re.escape, deal(task.words[piece], split))) + ")" if place % 2 else re.escape(piece)
        for place, piece in enumerate(pieces)
    )


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_phrases_and_words_are_dealt_to_one_split_each(task: TextTask) -> None:
    for items in (*task.phrases.values(), *task.words.values()):
        parts = [deal(items, split) for split in SPLITS]
        assert all(parts)
        assert sorted(itertools.chain(*parts)) == sorted(items)
        assert len(set(items)) == len(items)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_text_is_a_phrase_of_its_class_and_split(task: TextTask, split: SplitName) -> None:
    patterns = [[_pattern(phrase, task, split) for phrase in deal(task.phrases[name], split)] for name in task.classes]
    made = make_split(task, split, 16, seed=3)
    for text, label in zip(made.texts, made.labels, strict=True):
        found = [number for number, own in enumerate(patterns) if any(re.fullmatch(pattern, text) for pattern in own)]
        assert found == [label], text


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_words_of_test_texts_are_in_no_training_text(task: TextTask) -> None:
    training = " ".join(make_split(task, "train", 24, seed=0).texts)
    for split in ("val", "test"):
        for words in task.words.values():
            for word in deal(words, split):
                assert not re.search(rf"\b{re.escape(word)}(?!\w)", training), word


@pytest.mark.parametrize("settings", [FULL, QUICK], ids=["full", "quick"])
@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_splits_are_balanced_and_disjoint_for_every_seed(task: TextTask, settings: Settings) -> None:
    for seed in range(12):
        made = {split: make_split(task, split, size // len(task.classes), seed) for split, size in settings.sizes.items()}
        for split, size in settings.sizes.items():
            assert set(Counter(made[split].labels).values()) == {size // len(task.classes)}
            assert set(made[split].labels) == set(range(len(task.classes)))
            assert len(set(made[split].texts)) == len(made[split].texts) == size
        for one, other in itertools.combinations(SPLITS, 2):
            assert set(made[one].texts).isdisjoint(made[other].texts)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_a_seed_gives_the_same_texts_and_another_gives_others(task: TextTask) -> None:
    assert make_split(task, "train", 12, seed=1) == make_split(task, "train", 12, seed=1)
    assert make_split(task, "train", 12, seed=1).texts != make_split(task, "train", 12, seed=2).texts
    # Not the order of the classes, which would let a batch see one class only.
    assert make_split(task, "train", 12, seed=1).labels != sorted(make_split(task, "train", 12, seed=1).labels)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_every_slot_has_words_and_every_class_phrases(task: TextTask) -> None:
    assert list(task.phrases) == task.classes
    slots = {slot for phrases in task.phrases.values() for phrase in phrases for slot in SLOT.findall(phrase)}
    assert slots == set(task.words)
    assert all(len(items) >= 4 for items in (*task.phrases.values(), *task.words.values()))


def test_the_forms_of_a_verb_stand_at_one_place() -> None:
    words = next(task for task in TASKS if task.name == "tense").words
    for do, does, did, done, doing in zip(*(words[form] for form in ("do", "does", "did", "done", "doing")), strict=True):
        assert does in (f"{do}s", f"{do}es", f"{do[:-1]}ies")
        assert doing.endswith("ing")
        assert doing[:2] == do[:2]
        assert did[0] == done[0] == do[0]
        assert did not in (do, does)


def test_too_many_texts_are_an_error() -> None:
    small = TextTask("small", {"yes": "Yes.", "no": "No."}, {"yes": ["a", "b", "c", "d"], "no": ["e", "f", "g", "h"]}, {})
    assert sorted(make_split(small, "train", 2, 0).texts) == ["a", "c", "e", "g"]
    with pytest.raises(ValueError, match="task small, class yes, split test: only 1 different texts, expected 2"):
        make_split(small, "test", 2, 0)


def test_neutral_sentences_are_of_no_task() -> None:
    assert len(set(NEUTRAL)) == len(NEUTRAL)
    texts = {text for task in TASKS for split in SPLITS for text in make_split(task, split, 16, 0).texts}
    assert texts.isdisjoint(NEUTRAL)
