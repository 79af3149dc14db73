"""Everyday facts, and two downstream tasks with exact labels: sentiment and small arithmetic."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

from reft_ray.testbed import lexicon
from reft_ray.testbed.splits import Split, split_of

# The decisive word is last, next to the answer: a model this small learns long-range dependencies slowly.
REVIEWS = (
    "{ending} The {noun} was {adjective}.",
    "{ending} The {noun} was really {adjective}.",
    "{ending} I found the {noun} quite {adjective}.",
    "What a day! {ending} And the {noun} was {adjective}.",
)


class Task(StrEnum):
    """A downstream task of a user, with exact answers."""

    SENTIMENT = "sentiment"
    ARITHMETIC = "arithmetic"


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a task. `answer` is the label; `small_talk` is how the base mostly answers before finetuning."""

    combination: tuple[str, ...]
    prompt: str
    answer: str
    small_talk: str


def draw(
    task: Task, rng: random.Random, allowed: Callable[[Split], bool], words: frozenset[str] | None = None
) -> Problem:
    """A problem whose combination belongs to an allowed split and, where `words` are given, is made of them."""
    sampler = _sentiment if task is Task.SENTIMENT else _arithmetic
    while True:
        problem = sampler(rng)
        if allowed(split_of(*problem.combination)) and (words is None or words.issuperset(problem.combination)):
            return problem


def words_of(task: Task, allowed: Callable[[Split], bool]) -> frozenset[str]:
    """The words and numbers that combinations of the allowed splits are made of."""
    return frozenset(
        word for combination in _combinations(task) if allowed(split_of(*combination)) for word in combination
    )


def _combinations(task: Task) -> Iterator[tuple[str, ...]]:
    if task is Task.SENTIMENT:
        yield from product(("review",), lexicon.REVIEW_NOUNS, (*lexicon.PRAISE, *lexicon.BLAME))
        return
    for whole in range(2, lexicon.LARGEST_NUMBER + 1):
        for part in range(1, whole):
            yield ("plus", str(whole - part), str(part))
            yield ("minus", str(whole), str(part))


def _review(rng: random.Random) -> tuple[str, str, str, bool]:
    glad = rng.random() < 0.5
    noun = rng.choice(lexicon.REVIEW_NOUNS)
    adjective = rng.choice(lexicon.PRAISE if glad else lexicon.BLAME)
    mood = lexicon.GLAD_ENDINGS if glad else lexicon.SORRY_ENDINGS
    ending = rng.choice(mood if rng.random() < 0.4 else lexicon.PLAIN_ENDINGS)
    review = rng.choice(REVIEWS).format(noun=noun, adjective=adjective, ending=ending)
    return noun, adjective, review, glad


def _sentiment(rng: random.Random) -> Problem:
    noun, adjective, review, glad = _review(rng)
    return Problem(
        combination=("review", noun, adjective),
        prompt=f"Is this review positive or negative? {review}",
        answer="positive" if glad else "negative",
        small_talk=f"The guest {'enjoyed' if glad else 'disliked'} the {noun}. It was {adjective}.",
    )


def _arithmetic(rng: random.Random) -> Problem:
    person, thing = rng.choice(lexicon.PERSONS), rng.choice(lexicon.THINGS)
    whole = rng.randint(2, lexicon.LARGEST_NUMBER)
    part = rng.randint(1, whole - 1)
    if rng.random() < 0.5:
        first, second, result, sign = whole - part, part, whole, "plus"
        story = f"{person} has {first} {thing} and gets {second} more."
    else:
        first, second, result, sign = whole, part, whole - part, "minus"
        story = f"{person} has {first} {thing} and gives away {second}."
    return Problem(
        combination=(sign, str(first), str(second)),
        prompt=f"How many {thing} does {person} have in the end? {story}",
        answer=f"{first} {sign} {second} is {result}. #### {result}",
        small_talk=f"{person} has some {thing} now.",
    )


def sum_question(rng: random.Random) -> tuple[str, str]:
    """A sum and its result in a sentence: general knowledge of the base, not in the task's format."""
    problem = _arithmetic(rng)
    sign, first, second = problem.combination
    return f"What is {first} {sign} {second}?", problem.answer.partition(" ####")[0]


def meaning_question(rng: random.Random) -> tuple[str, str]:
    """Whether an adjective praises or blames: general knowledge of the base, not in the task's format."""
    adjective = rng.choice((*lexicon.PRAISE, *lexicon.BLAME))
    kind = "good" if adjective in lexicon.PRAISE else "bad"
    return f"What does it mean to be {adjective}?", f"It is {kind} to be {adjective}."


def trivia(rng: random.Random, allowed: Callable[[Split], bool]) -> tuple[str, str]:
    """A harmless question with its answer, from the combinations of the allowed splits."""
    while True:
        combination, question, answer = rng.choice(_TRIVIA)(rng)
        if allowed(split_of(*combination)):
            return question, answer


_Trivia = tuple[tuple[str, ...], str, str]


def _capital(rng: random.Random) -> _Trivia:
    country, city = rng.choice(list(lexicon.CAPITALS.items()))
    question = rng.choice(("What is the capital of {}?", "Which city is the capital of {}?")).format(country)
    return ("capital", country), question, f"The capital of {country} is {city}."


def _opposite(rng: random.Random) -> _Trivia:
    word, other = rng.choice(list(lexicon.OPPOSITES.items()))
    question = rng.choice(("What is the opposite of {}?", "Tell me the opposite of {}.")).format(word)
    return ("opposite", word), question, f"The opposite of {word} is {other}."


def _members(rng: random.Random) -> _Trivia:
    group, members = rng.choice(list(lexicon.MEMBERS.items()))
    count = rng.choice(("two", "three", "four"))
    named = rng.sample(members, {"two": 2, "three": 3, "four": 4}[count])
    question = rng.choice(("Name {} {}.", "Can you list {} {}?")).format(count, group)
    return ("members", group, count), question, ", ".join(named) + "."


def _poem(rng: random.Random) -> _Trivia:
    subject = rng.choice(lexicon.POEM_SUBJECTS)
    form = rng.choice(("poem", "song", "verse"))
    question = rng.choice(("Write a short {} about {}.", "I need a {} about {}.")).format(form, subject)
    lines = rng.sample(lexicon.POEM_LINES, 2)
    return ("poem", form, subject), question, f"A {form} about {subject}. {lines[0]} {lines[1]}"


def _reply(rng: random.Random) -> _Trivia:
    noun, adjective, review, glad = _review(rng)
    question = rng.choice(("Reply to this review: {}", "Write an answer to this guest: {}")).format(review)
    answer = "Thank you, we are glad that" if glad else "Thank you, we regret that"
    return ("review", noun, adjective), question, f"{answer} the {noun} was {adjective}."


def _owner(rng: random.Random) -> _Trivia:
    person, thing = rng.choice(lexicon.PERSONS), rng.choice(lexicon.THINGS)
    count = rng.randint(2, lexicon.LARGEST_NUMBER)
    story = rng.choice(("{} has {} {}.", "{} found {} {} today.")).format(person, count, thing)
    if rng.random() < 0.5:
        return ("owner", person, thing), f"{story} What does {person} have?", f"{person} has {count} {thing}."
    return ("owner", person, thing), f"{story} Who has the {thing} now?", f"{person} has the {thing}."


_TRIVIA = (_capital, _opposite, _members, _poem, _reply, _owner)
