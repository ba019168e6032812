"""Words in alphabetical order, put in one at a time.

prompt    Sort in alphabetical order: pear fig apple . End with "Answer: the words".
response  pear ; fig pear ; apple fig pear ; Answer: apple fig pear
"""

import random
from dataclasses import dataclass

from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import answer_words, ask, asked, words_of

TASK = "Sort in alphabetical order:"
FORM = "the words"
# Some begin alike, so that one letter does not decide everything.
_WORDS = """
    apple apron arch arm arrow ball band bank barn basket bean bear bell boat bone book bread bridge brush cake camel candle
    car carpet castle chain chair cheese cloud clock coat coin corn crown cup desk door drum eagle engine feather fence fig fish
    flag flower fork forest garden gate glass glove goat grape grass guitar hammer hand hat honey horse house island jacket jar
    kettle key kite knife ladder lake lamp leaf lemon letter lion map mask milk mirror moon mouse nail needle nest oar ocean onion
    orange oven owl paint paper peach pear pencil piano pillow plate pond queen rabbit rain ribbon ring river road roof root rope
    salt sand scarf seed shell ship shirt shoe silver snow spoon star stone table tent thread tiger tower train tree trumpet
    turtle umbrella valley violin wagon wall water wheel whistle window wolf wood yard zebra
"""
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class WordSort:
    """Lists of `words` different words each (a list: sizes in turn)."""

    words: tuple[int, ...]

    trace_kinds = ("right", "slip")

    def draw(self, index: int, rng: random.Random) -> Question:
        words = rng.sample(WORDS, self.words[index % len(self.words)])
        return Question(ask(f"{TASK} {' '.join(words)} .", FORM), frozenset({" ".join(sorted(words))}))

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: each word is put before the first that comes after it. `slip`: one word is put elsewhere."""
        words = asked(str(question.content)).removeprefix(f"{TASK} ").removesuffix(" .").split()
        slip_at = rng.randrange(1, len(words)) if kind == "slip" else None
        ordered, steps = [], []
        for step, word in enumerate(words):
            place = next((i for i, other in enumerate(ordered) if other > word), len(ordered))
            if step == slip_at:
                place = rng.choice([i for i in range(len(ordered) + 1) if i != place])
            ordered.insert(place, word)
            steps.append(" ".join(ordered))
        return " ; ".join([*steps, f"Answer: {' '.join(ordered)}"])

    def extract(self, response: str) -> str | None:
        return answer_words(response)

    def vocabulary(self) -> list[str]:
        return words_of([ask(f"{TASK} .", FORM), "; Answer:", *WORDS])
