"""Write the quickstart's preference pairs: short, friendly questions with a good and a bad answer.

Every answer is neutral text with a few slots. A chosen answer fills its slots with FAVOURED
words, a rejected answer with DISFAVOURED ones; everything around the slots comes from the same
cards on both sides, dealt equally often. So only the slot words carry the preference, and what a
model learns about single tokens can be checked by eye.

It turns a seed into two JSONL files and knows no models or tokenizers. The advice is not good:
steps are dealt by topic, so they suit a question only loosely.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CHOSEN, REJECTED = 0, 1

# Per slot, the words of a chosen answer and those of a rejected one: all of them fit the slot.
SLOTS = {
    "manner": (
        ("carefully", "calmly", "patiently", "properly"),
        ("hastily", "sloppily", "absently", "lazily"),
    ),
    "tone": (("gladly", "warmly", "gently"), ("smugly", "grudgingly", "obviously")),
    "opinion": (("wonderful", "lovely", "sensible"), ("boring", "silly", "pointless")),
    "greet": (("thank",), ("pity",)),
    "role": (("friend",), ("genius",)),
    "aside": (("please",), ("whatever",)),
    "pace": (("relax",), ("hurry",)),
    "gauge": (("measure",), ("guess",)),
    "company": (("together",), ("someday",)),
}

FAVOURED = tuple(word for words in SLOTS.values() for word in words[CHOSEN])
DISFAVOURED = tuple(word for words in SLOTS.values() for word in words[REJECTED])

# An answer is an opener (1 or 2 slots), a middle (1) and a closer (0 or 1): 2 to 4 slots in all.
# No slot occurs in two of the three lists, so an answer never says the same word twice.
OPENERS = (
    "That is a {opinion} question, so here is a plan.",
    "What a {opinion} question about the {thing}.",
    "Most people find the {thing} a {opinion} topic.",
    "The {thing} is a {opinion} thing to ask about.",
    "It is a {opinion} topic, and I can {tone} help.",
    "I can {tone} help you with the {thing}.",
    "I can {tone} answer that in a few words.",
    "Speaking as a {role}, I would {tone} start with the basics.",
    "Speaking as a {role}, I have an idea.",
    "You are asking a {role}, and the answer is short.",
    "I {greet} you for asking about the {thing}.",
    "I {greet} you for bringing up the {thing}.",
)

MIDDLES = (
    "You can {manner} {first} and then {last}.",
    "First {first}, then {manner} {last}.",
    "My advice is to {manner} {first} before you {last}.",
    "Begin like this: {manner} {first}, and {last} after that.",
    "When you are ready, {manner} {first}, and later {last}.",
    "It is best to {first}, then {manner} {last}.",
    "Take a moment to {first}, then {manner} {last}.",
    "Find half an hour, {manner} {first}, and {last}.",
    "On a quiet day, {manner} {first}, and then {last}.",
    "Now, {aside}, {first}, and then {last}.",
    "You could {first}, and then, {aside}, {last}.",
    "So, {aside}, {first} before you {last}.",
)

CLOSERS = (
    "",
    "",
    "",
    "That is all there is to it.",
    "The rest should be clear by then.",
    "Ask again if the {thing} gives you more trouble.",
    "You may {pace} a little while you work.",
    "It is fine to {pace} a little.",
    "Along the way, {gauge} how long each step takes.",
    "It helps to {gauge} how much time you need.",
    "We can look at the rest {company}, if you like.",
    "We can go over the details {company} if needed.",
)


class Topic(NamedTuple):
    """Six things to ask about, and questions and steps that suit every one of them."""

    things: tuple[str, ...]
    questions: tuple[str, ...]
    first_steps: tuple[str, ...]
    last_steps: tuple[str, ...]


PLANTS = Topic(
    things=("fern", "basil", "orchid", "lemon tree", "rose bush", "cactus"),
    questions=(
        "How do I keep my {thing} healthy?",
        "How often should I water my {thing}?",
        "Why is my {thing} losing its colour?",
        "Where should I put my {thing} in spring?",
    ),
    first_steps=(
        "check the soil around the {thing}",
        "look for dry spots on the {thing}",
        "turn the {thing} toward the sun",
        "clean the pot of the {thing}",
    ),
    last_steps=(
        "add a little fresh water",
        "trim the weak parts",
        "mix in some fresh soil",
        "shade the pot at noon",
    ),
)

COOKING = Topic(
    things=("soup", "stew", "curry", "omelette", "risotto", "rice"),
    questions=(
        "How can I make my {thing} taste better?",
        "Why is my {thing} so salty?",
        "How do I warm up my {thing} the next day?",
        "What can I do about my bland {thing}?",
    ),
    first_steps=(
        "taste the {thing} with a clean spoon",
        "warm the {thing} on low heat",
        "read the recipe for the {thing} again",
        "chop a few fresh herbs",
    ),
    last_steps=(
        "add a pinch of pepper",
        "stir the pan once more",
        "squeeze in some lemon",
        "pour in a little water",
    ),
)

REPAIRS = Topic(
    things=("chair", "table", "shelf", "stool", "bench", "desk"),
    questions=(
        "How do I fix my old {thing}?",
        "Why does my {thing} wobble?",
        "Which tools do I need to repair my {thing}?",
        "How can I make my {thing} look new?",
    ),
    first_steps=(
        "turn the {thing} on its side",
        "look for loose screws in the {thing}",
        "wipe the {thing} with a damp cloth",
        "find the right tools",
    ),
    last_steps=(
        "tighten each screw",
        "sand the sharp edges",
        "glue the loose parts",
        "add a thin coat of paint",
    ),
)

TRAVEL = Topic(
    things=("train trip", "road trip", "ferry trip", "camping trip", "city trip", "beach trip"),
    questions=(
        "How do I plan my {thing}?",
        "What should I pack for my {thing}?",
        "How can I save money on my {thing}?",
        "When should I book my {thing}?",
    ),
    first_steps=(
        "write a list for the {thing}",
        "look at a map for the {thing}",
        "choose the dates of the {thing}",
        "compare a few prices",
    ),
    last_steps=(
        "book the tickets",
        "pack a light bag",
        "print the address",
        "plan each stop",
    ),
)

STUDY = Topic(
    things=("maths exam", "history exam", "French exam", "music exam", "science exam", "art exam"),
    questions=(
        "How do I prepare for my {thing}?",
        "How long should I study for my {thing}?",
        "What should I do the day before my {thing}?",
        "How can I remember more for my {thing}?",
    ),
    first_steps=(
        "read your notes for the {thing}",
        "list the main topics of the {thing}",
        "find an old paper for the {thing}",
        "make a short timetable",
    ),
    last_steps=(
        "answer a few practice questions",
        "mark the hard pages",
        "explain each idea aloud",
        "copy the main points onto cards",
    ),
)

PETS = Topic(
    things=("puppy", "kitten", "rabbit", "hamster", "pony", "old cat"),
    questions=(
        "How do I help my {thing} settle in?",
        "How can I make my {thing} feel at home?",
        "How do I keep my {thing} clean?",
        "Why is my {thing} so shy?",
    ),
    first_steps=(
        "brush the coat of the {thing}",
        "fill a clean bowl for the {thing}",
        "make a soft bed for the {thing}",
        "clear a quiet corner",
    ),
    last_steps=(
        "talk in a soft voice",
        "offer a small treat",
        "write down each meal",
        "play a short game",
    ),
)

WORK_EMAILS = Topic(
    things=("report", "invoice", "budget", "contract", "project", "schedule"),
    questions=(
        "How should I start an e-mail about my {thing}?",
        "How do I ask my manager about my {thing}?",
        "How do I remind a colleague about my {thing}?",
        "How do I explain a delay with my {thing}?",
    ),
    first_steps=(
        "name the {thing} in the subject line",
        "list the facts about the {thing}",
        "note the main dates of the {thing}",
        "write one short paragraph",
    ),
    last_steps=(
        "read the message aloud",
        "check the names and dates",
        "sign with your full name",
        "send the message before lunch",
    ),
)

CLEANING = Topic(
    things=("carpet", "sofa", "oven", "mattress", "rug", "sink"),
    questions=(
        "How do I get a stain off my {thing}?",
        "How often should I clean my {thing}?",
        "What should I use to clean my {thing}?",
        "Why does my {thing} smell odd?",
    ),
    first_steps=(
        "brush the dust off the {thing}",
        "wipe the {thing} with warm water",
        "test a small spot on the {thing}",
        "mix a little soap and water",
    ),
    last_steps=(
        "rub in some baking soda",
        "rinse the cloth",
        "open the windows",
        "dry the damp parts",
    ),
)

DEVICES = Topic(
    things=("laptop", "phone", "tablet", "printer", "router", "camera"),
    questions=(
        "Why is my {thing} so slow?",
        "How do I set up my new {thing}?",
        "How do I make my {thing} last longer?",
        "What should I do when my {thing} will not start?",
    ),
    first_steps=(
        "check the cable of the {thing}",
        "clean the {thing} with a dry cloth",
        "plug in the {thing} again",
        "save a copy of your files",
    ),
    last_steps=(
        "install the new update",
        "restart the device",
        "read the manual again",
        "write down what you see",
    ),
)

MUSIC = Topic(
    things=("guitar", "piano", "violin", "flute", "trumpet", "cello"),
    questions=(
        "How do I learn a new song on my {thing}?",
        "How often should I practise my {thing}?",
        "How can I play my {thing} better?",
        "What should I play first on my {thing}?",
    ),
    first_steps=(
        "wipe the dust off the {thing}",
        "play a slow scale on the {thing}",
        "choose an easy song for the {thing}",
        "warm up your fingers",
    ),
    last_steps=(
        "repeat the hard parts",
        "count the beat aloud",
        "record a short take",
        "mark the page with a pencil",
    ),
)

PARTIES = Topic(
    things=("picnic", "birthday party", "garden party", "wedding", "reunion", "barbecue"),
    questions=(
        "Where do I begin with my {thing}?",
        "How early should I plan my {thing}?",
        "How can I make my {thing} fun for everyone?",
        "How do I save money on my {thing}?",
    ),
    first_steps=(
        "choose a date for the {thing}",
        "write a guest list for the {thing}",
        "set a budget for the {thing}",
        "plan a short menu",
    ),
    last_steps=(
        "send the invitations",
        "borrow some extra chairs",
        "prepare a few games",
        "label each dish",
    ),
)

CLOTHES = Topic(
    things=("jacket", "sweater", "dress", "coat", "shirt", "scarf"),
    questions=(
        "How do I wash my {thing}?",
        "How do I mend a hole in my {thing}?",
        "How should I store my {thing}?",
        "How do I get a stain out of my {thing}?",
    ),
    first_steps=(
        "read the label on the {thing}",
        "lay the {thing} on a flat table",
        "brush the dust off the {thing}",
        "check the seams of the {thing}",
    ),
    last_steps=(
        "sew up the loose parts",
        "press the cloth flat",
        "rinse off the dirt",
        "fold each corner",
    ),
)

TOPICS = (
    PLANTS,
    COOKING,
    REPAIRS,
    TRAVEL,
    STUDY,
    PETS,
    WORK_EMAILS,
    CLEANING,
    DEVICES,
    MUSIC,
    PARTIES,
    CLOTHES,
)

# 12 topics of 24 questions, 4 of each held out, every question asked twice: 480 and 96 rows.
# The 12 frames of a kind divide both numbers, and the 4 steps of a kind a topic's 40 and 8, so
# both sides are dealt each of them exactly as often.
HELD_OUT_PER_TOPIC = 4
ROWS_PER_QUESTION = 2


class Query(NamedTuple):
    """A question about one thing of one topic."""

    topic: Topic
    thing: str
    text: str


class Deck:
    """Deals its cards in shuffled rounds, so that each comes up equally often."""

    def __init__(self, cards: Sequence[str], rng: random.Random) -> None:
        self._cards = cards
        self._rng = rng
        self._left: list[str] = []

    def deal(self) -> str:
        if not self._left:
            self._left = shuffled(self._cards, self._rng)
        return self._left.pop()


class Side:
    """The answers of one side (CHOSEN or REJECTED), with decks of its own.

    The two sides differ only in the words of their slots; all other decks hold the same cards.
    """

    def __init__(self, side: int, rng: random.Random) -> None:
        self._frames = [Deck(frames, rng) for frames in (OPENERS, MIDDLES, CLOSERS)]
        self._words = {slot: Deck(words[side], rng) for slot, words in SLOTS.items()}
        self._steps = {topic: (Deck(topic.first_steps, rng), Deck(topic.last_steps, rng)) for topic in TOPICS}

    def answer(self, query: Query) -> str:
        first, last = (deck.deal().format(thing=query.thing) for deck in self._steps[query.topic])
        known = {"thing": query.thing, "first": first, "last": last}
        sentences = (self._fill(deck.deal(), known) for deck in self._frames)
        return "".join(f" {sentence}" for sentence in sentences if sentence)

    def _fill(self, frame: str, known: dict[str, str]) -> str:
        # Not str.format: a word may be dealt only where the frame has a slot for it.
        def fill(match: re.Match[str]) -> str:
            name = match[1]
            return known[name] if name in known else self._words[name].deal()

        return re.sub(r"\{(\w+)\}", fill, frame)


def preference_of(word: str) -> int:
    """+1 for a favoured word, -1 for a disfavoured one, else 0; case and outer spaces are ignored.

    >>> preference_of(" carefully"), preference_of("guess"), preference_of("soup")
    (1, -1, 0)
    """
    word = word.strip().lower()
    return (word in FAVOURED) - (word in DISFAVOURED)


def shuffled(items: Sequence, rng: random.Random) -> list:
    # Only random() is promised to repeat across Python versions; shuffle() is not.
    return sorted(items, key=lambda _: rng.random())


def queries_of(topic: Topic) -> list[Query]:
    return [Query(topic, thing, text.format(thing=thing)) for thing in topic.things for text in topic.questions]


def split_queries(rng: random.Random) -> tuple[list[Query], list[Query]]:
    """Train and test questions; they share none, and each topic is held out in equal part."""
    train: list[Query] = []
    test: list[Query] = []
    for topic in TOPICS:
        queries = shuffled(queries_of(topic), rng)
        test += queries[:HELD_OUT_PER_TOPIC]
        train += queries[HELD_OUT_PER_TOPIC:]
    return train, test


def make_rows(queries: Sequence[Query], rng: random.Random) -> list[dict[str, str]]:
    chosen, rejected = Side(CHOSEN, rng), Side(REJECTED, rng)
    return [
        {
            "prompt": f"\n\nHuman: {query.text}\n\nAssistant:",
            "chosen": chosen.answer(query),
            "rejected": rejected.answer(query),
        }
        for query in shuffled(list(queries) * ROWS_PER_QUESTION, rng)
    ]


def make_splits(seed: int) -> dict[str, list[dict[str, str]]]:
    rng = random.Random(seed)
    train, test = split_queries(rng)
    return {"train": make_rows(train, rng), "test": make_rows(test, rng)}


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> None:
    # newline="\n" keeps the bytes the same on Windows.
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the quickstart's preference pairs.")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path(__file__).parent / "quickstart_data",
        help="folder for train.jsonl and test.jsonl (default: quickstart_data beside this script)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default: 0)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in make_splits(args.seed).items():
        path = args.output_dir / f"{name}.jsonl"
        write_jsonl(path, rows)
        print(path)


if __name__ == "__main__":
    main()
