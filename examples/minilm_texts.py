"""Two text classification tasks made of phrases and word lists: what a support request wants, and whether a review is positive.

A task is data: its classes, phrases with slots, and the words for the slots. Phrases and words are dealt out to the splits, so that no
phrase and no word of the validation and test texts was seen in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

SplitName = Literal["train", "val", "test"]

# Of every four phrases or words two are for training, one for validation, one for the test.
_PLACES: dict[SplitName, tuple[int, ...]] = {"train": (0, 2), "val": (1,), "test": (3,)}
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Split:
    """Texts and the index of each one's class."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class TextTask:
    """A classification task.

    Attributes
    ----------
    name
        Of its folders and its column in the table.
    descriptions
        One sentence for each class, from which its frozen head is made.
    phrases
        For each class, phrases with slots in braces: at least four.
    words
        For each slot, what may stand there: at least four.
    """

    name: str
    descriptions: Mapping[str, str]
    phrases: Mapping[str, Sequence[str]]
    words: Mapping[str, Sequence[str]]

    @property
    def classes(self) -> list[str]:
        """Names of the classes; labels count in this order."""
        return list(self.descriptions)


def deal(items: Sequence[str], split: SplitName) -> list[str]:
    """The items that belong to a split: by their place, whatever the seed."""
    return [item for place, item in enumerate(items) if place % 4 in _PLACES[split]]


def _filled(phrases: Sequence[str], words: Mapping[str, Sequence[str]], draw: random.Random) -> Iterator[str]:
    """Endless texts: the phrases in turn, each with random words."""
    while True:
        for phrase in phrases:
            yield _SLOT.sub(lambda slot: draw.choice(words[slot[1]]), phrase)


def make_split(task: TextTask, split: SplitName, per_class: int, seed: int) -> Split:
    """Texts of one split: ``per_class`` different ones of each class, in random order.

    Raises
    ------
    ValueError
        If the phrases and words of the split cannot give that many different texts.
    """
    # A text as the seed: the same numbers on every machine, others for each task and split.
    draw = random.Random(f"{seed} {task.name} {split}")
    words = {slot: deal(choices, split) for slot, choices in task.words.items()}
    made: list[tuple[str, int]] = []
    for label, name in enumerate(task.classes):
        texts: dict[str, None] = {}
        tries = _filled(deal(task.phrases[name], split), words, draw)
        for _, text in zip(range(100 * per_class), tries, strict=False):
            texts[text] = None
            if len(texts) == per_class:
                break
        if len(texts) < per_class:
            raise ValueError(f"task {task.name}, class {name}, split {split}: only {len(texts)} different texts, expected {per_class}")
        made.extend((text, label) for text in texts)
    draw.shuffle(made)
    return Split([text for text, _ in made], [label for _, label in made])


_ITEMS = (
    *("kettle", "lamp", "backpack", "camera", "blender", "jacket", "chair", "keyboard", "tent", "bicycle", "toaster", "speaker"),
    *("mattress", "printer", "suitcase", "watch", "drill", "desk", "monitor", "umbrella", "heater", "razor", "scooter", "sofa"),
)
_TIMES = (
    *("on Monday", "on Tuesday", "on Friday", "on Sunday", "last week", "yesterday", "two days ago", "last month"),
    *("in March", "in June", "in April", "in August", "before Easter", "at Christmas", "this morning", "on the weekend"),
)

INTENT = TextTask(
    name="intent",
    descriptions={
        "refund": "I want my money back.",
        "delivery": "Where is my parcel?",
        "login": "I cannot log in to my account.",
        "cancel": "Please cancel my order.",
        "address": "Please change my delivery address.",
        "invoice": "I need an invoice for my purchase.",
        "damage": "The product arrived broken.",
        "exchange": "I would like to swap it for another size or colour.",
    },
    phrases={
        "refund": (
            "{hello} Please pay back what I spent on the {item}.",
            "{hello} When will the price of the {item} be on my card again?",
            "{hello} The {item} went back to you {when}; now I am waiting for my cash.",
            "{hello} You took payment for the {item} twice, return one of the two.",
            "{hello} I sent back the {item} and nothing has reached my bank since.",
            "{hello} How do I get reimbursed for the {item}?",
            "{hello} I was charged too much for the {item}, give me the difference.",
            "{hello} My bank shows no credit for the {item} that I returned {when}.",
            "{hello} Did you already transfer the amount for the {item}?",
            "{hello} The {item} never came, so I want what it cost.",
            "{hello} Reverse the charge for the {item} from {when}, please.",
            "{hello} I would like the sum for the {item} on my account again.",
        ),
        "delivery": (
            "{hello} The {item} should have come {when}, and nobody rang.",
            "{hello} Can you tell me when the {item} gets here?",
            "{hello} The tracking page of the {item} has said the same thing for days.",
            "{hello} I have been at home since {when} and there is no sign of the {item}.",
            "{hello} Did the courier lose the {item}?",
            "{hello} How long does it take until the {item} is at my door?",
            "{hello} Is the {item} on its way already?",
            "{hello} Somebody signed for the {item} {when}, but it was not me.",
            "{hello} The {item} was promised {when} and it is not here.",
            "{hello} The map shows the van with my {item} going round in circles.",
            "{hello} Why does the {item} take so long to arrive?",
            "{hello} My order of the {item} has been at the customs since {when}.",
        ),
        "login": (
            "{hello} The site rejects my password since {when}.",
            "{hello} I no longer have the phone that gets the security code, I lost it {when}.",
            "{hello} To see the {item} that I bought, the page asks for a name that I forgot.",
            "{hello} After I bought the {item} I was locked out.",
            "{hello} The link from {when} that should reset my password does nothing.",
            "{hello} Since {when} it says that my e-mail is unknown to you.",
            "{hello} How do I get into my profile again, where the {item} is on the list?",
            "{hello} I wanted to look at the {item} in my history, but the site says wrong credentials.",
            "{hello} My user name and the {item} that I bought are gone from the page.",
            "{hello} It tells me that I typed the wrong PIN three times {when}.",
            "{hello} I do not get the e-mail that confirms who I am, not {when} and not today.",
            "{hello} The app throws me out as soon as I enter my data to buy the {item}.",
        ),
        "cancel": (
            "{hello} I bought the {item} by mistake {when}, stop it please.",
            "{hello} Do not send the {item}, I have changed my mind.",
            "{hello} I no longer need the {item} that I asked for {when}.",
            "{hello} Take the {item} off my list before it leaves the warehouse.",
            "{hello} Is it too late to withdraw from buying the {item}?",
            "{hello} I found the {item} cheaper elsewhere, so forget about my purchase.",
            "{hello} Please do not ship the {item}.",
            "{hello} I ordered the {item} twice {when}, one is enough.",
            "{hello} Drop the {item} from what I bought {when}.",
            "{hello} Can I still call off the {item}?",
            "{hello} We do not want the {item} any more.",
            "{hello} Undo yesterday's purchase of the {item}, it was my child who clicked.",
        ),
        "address": (
            "{hello} I moved {when}, so the {item} has to go to my new flat.",
            "{hello} Send the {item} to my office instead of my home.",
            "{hello} There is a typo in my street for the {item}.",
            "{hello} The house number that you have for me and the {item} is wrong.",
            "{hello} Could the {item} go to my neighbour, as I travel {when}?",
            "{hello} My postcode is not the one on the form for the {item}.",
            "{hello} I live somewhere else since {when}; where do I enter that?",
            "{hello} Let the driver bring the {item} to my parents' place.",
            "{hello} Could you correct the town on the label of the {item}?",
            "{hello} The {item} must not go to where I lived before.",
            "{hello} My building has a new name, please write that on the {item}.",
            "{hello} We moved house {when} and you still have the old street.",
        ),
        "invoice": (
            "{hello} My employer wants a bill for the {item}.",
            "{hello} I cannot find the receipt of the {item} from {when}.",
            "{hello} For my taxes I have to prove what the {item} cost.",
            "{hello} The document for the {item} must show our company's name.",
            "{hello} Please mail me the paperwork with the VAT for the {item}.",
            "{hello} Where can I download the PDF that shows what I paid {when}?",
            "{hello} The sum printed on the bill for the {item} is not right.",
            "{hello} Accounting asks for proof of payment for the {item}.",
            "{hello} The slip in the box of the {item} got lost, can I have a copy?",
            "{hello} I have to hand in a statement of what I bought {when}.",
            "{hello} Our tax office wants to see the bill of the {item}.",
            "{hello} Send me the official document for the {item} once more.",
        ),
        "damage": (
            "{hello} There is a crack in the {item} that came {when}.",
            "{hello} When I opened the box, the {item} was in pieces.",
            "{hello} One part of the {item} fell off when I unpacked it.",
            "{hello} The {item} has a big scratch on one side.",
            "{hello} The {item} was crushed on its way to me.",
            "{hello} The new {item} does not switch on.",
            "{hello} Half of the {item} is bent, and the carton was torn.",
            "{hello} The {item} came with a hole in it {when}.",
            "{hello} The screen of the {item} is shattered.",
            "{hello} After one hour the {item} fell apart.",
            "{hello} The {item} leaks and smells of smoke.",
            "{hello} The lid of the {item} is dented and does not close.",
        ),
        "exchange": (
            "{hello} The {item} is too small, do you have a larger one?",
            "{hello} I picked the {item} in red, but blue suits me better.",
            "{hello} Can I trade the {item} for the bigger model?",
            "{hello} The {item} from {when} does not fit, I need one number up.",
            "{hello} I would rather have the {item} in black.",
            "{hello} My wife prefers a different version of the {item}.",
            "{hello} Could you replace the {item} with the wider kind?",
            "{hello} The {item} should have been the green one, can we switch?",
            "{hello} I ordered the wrong size of the {item}.",
            "{hello} Is the {item} also there in white? Then I take that.",
            "{hello} I want to give back this {item} for a longer one.",
            "{hello} The {item} is too wide, please let me have a narrow one.",
        ),
    },
    words={
        "hello": (
            *("Hello!", "Good morning.", "Hi,", "Dear team,", "Good evening.", "Excuse me,", "Hey,", "To whom it may concern:"),
            *("Greetings.", "Please help.", "Hi everyone.", "Good day."),
        ),
        "item": _ITEMS,
        "when": _TIMES,
    },
)

TENSE = TextTask(
    name="tense",
    descriptions={
        "past": "It happened in the past.",
        "present": "It happens now.",
        "future": "It will happen in the future.",
    },
    phrases={
        "past": (
            "{who} {did} the {thing} {place}.",
            "The {thing} was {done} by {who} {place}.",
            "{who} was {doing} the {thing} {place}.",
            "{who} has already {done} the {thing} {place}.",
            "Did {who} {do} the {thing} {place}?",
            "{who} had {done} the {thing} {place}.",
            "{who} never {did} the {thing} {place}.",
            "It was {who} who {did} the {thing} {place}.",
            "Why did {who} {do} the {thing}?",
            "The {thing} {place} had been {done} by {who}.",
            "{who} did not {do} the {thing} {place}.",
            "Where did {who} {do} the {thing}?",
        ),
        "present": (
            "{who} {does} the {thing} {place}.",
            "The {thing} is {done} by {who} {place}.",
            "{who} is {doing} the {thing} {place}.",
            "{who} usually {does} the {thing} {place}.",
            "Does {who} {do} the {thing} {place}?",
            "{who} is just {doing} the {thing} {place}.",
            "{who} never {does} the {thing} {place}.",
            "It is {who} who {does} the {thing} {place}.",
            "Why does {who} {do} the {thing}?",
            "The {thing} {place} is being {done} by {who}.",
            "{who} does not {do} the {thing} {place}.",
            "Where does {who} {do} the {thing}?",
        ),
        "future": (
            "{who} will {do} the {thing} {place}.",
            "The {thing} will be {done} by {who} {place}.",
            "{who} is going to {do} the {thing} {place}.",
            "{who} will soon be {doing} the {thing} {place}.",
            "Will {who} {do} the {thing} {place}?",
            "{who} is about to {do} the {thing} {place}.",
            "{who} will never {do} the {thing} {place}.",
            "It will be {who} who {does} the {thing} {place}.",
            "Why will {who} {do} the {thing}?",
            "The {thing} {place} is going to be {done} by {who}.",
            "{who} will not {do} the {thing} {place}.",
            "Where is {who} going to {do} the {thing}?",
        ),
    },
    words={
        "who": (
            *("my sister", "the teacher", "our neighbour", "the doctor", "a young man", "the cook", "her father", "the gardener"),
            *("his aunt", "the mayor", "an old woman", "the painter", "their friend", "the driver", "somebody", "the boy"),
        ),
        "thing": (
            *("chair", "lamp", "table", "bucket", "mirror", "ladder", "carpet", "basket"),
            *("clock", "bottle", "shelf", "curtain", "barrel", "toy", "picture", "box"),
        ),
        "place": (
            *(
                "in the kitchen",
                "at school",
                "in the garden",
                "at the market",
                "behind the house",
                "in the office",
                "on the beach",
                "at the station",
            ),
            *("in the village", "near the river", "in the cellar", "on the roof"),
        ),
        "do": (
            *("wash", "paint", "buy", "sell", "break", "find", "clean", "steal"),
            *("repair", "carry", "take", "bring", "draw", "move", "hide", "lift"),
            *("choose", "lose", "weigh", "throw", "build", "forget", "show", "burn"),
        ),
        "does": (
            *("washes", "paints", "buys", "sells", "breaks", "finds", "cleans", "steals"),
            *("repairs", "carries", "takes", "brings", "draws", "moves", "hides", "lifts"),
            *("chooses", "loses", "weighs", "throws", "builds", "forgets", "shows", "burns"),
        ),
        "did": (
            *("washed", "painted", "bought", "sold", "broke", "found", "cleaned", "stole"),
            *("repaired", "carried", "took", "brought", "drew", "moved", "hid", "lifted"),
            *("chose", "lost", "weighed", "threw", "built", "forgot", "showed", "burned"),
        ),
        "done": (
            *("washed", "painted", "bought", "sold", "broken", "found", "cleaned", "stolen"),
            *("repaired", "carried", "taken", "brought", "drawn", "moved", "hidden", "lifted"),
            *("chosen", "lost", "weighed", "thrown", "built", "forgotten", "shown", "burned"),
        ),
        "doing": (
            *("washing", "painting", "buying", "selling", "breaking", "finding", "cleaning", "stealing"),
            *("repairing", "carrying", "taking", "bringing", "drawing", "moving", "hiding", "lifting"),
            *("choosing", "losing", "weighing", "throwing", "building", "forgetting", "showing", "burning"),
        ),
    },
)

TASKS = (INTENT, TENSE)

# Of no task: how far a model's embeddings of these move from the base's shows what an edit does beside its purpose.
NEUTRAL = (
    "The old bridge crosses a narrow valley.",
    "Copper conducts electricity better than iron.",
    "Penguins live in the southern half of the world.",
    "A sonnet has fourteen lines.",
    "The committee meets in a room without windows.",
    "Yeast turns sugar into alcohol and gas.",
    "Two rivers join below the castle.",
    "The violin is tuned in fifths.",
    "Most of the island is covered by forest.",
    "A prime number has exactly two divisors.",
    "The museum keeps maps from four centuries.",
    "Basalt is a dark volcanic rock.",
    "Chess is played on sixty-four squares.",
    "The harbour freezes only in hard winters.",
    "Bees see ultraviolet light.",
    "The moon has no air to speak of.",
)
