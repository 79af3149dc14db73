"""The package and its documents use the standard terms of the field, not private words."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Phrase (a regular expression without case; a space also matches the line break in a comment) -> say instead.
WORDS = {
    "foretold|foretells?": "predicted, estimated",
    "mend|mends|mended|mending": "fix",
    "whoever|somebody|nobody": "the user, caller or process; none",
    "told": "configured, reported, given, said",
    "tells": "reports, returns, says",
    "tell apart": "distinguish",
    "world": "context, data, rows; world_size for ranks",
    "surroundings": "context",
    "behind": "after, under, in, with",
    "beside": "next to, with, in addition to",
    "lies (?:in|on|at|under|below|within|between|there|here)": "is, is stored in",
    "it stands|stands (?:for|in|on|at|above|below|under|there|here|alone|beside|still)": "is, is for, stops",
    "(?:is|are|was|were) no [a-z]+": "is not a",
    "goes on|go on|going on|gone on|went on": "continues, resumes",
    "(?:the|this|our|no|each|every|one|a) (?:house|room)|houses|rooms": "package, directory",
    "seats?": "slot, request",
    "its papers|with papers": "model card, provenance",
    "the lot": "everything, all",
    "so many": "up to, the number of",
    "apart": "separately",
    "an other": "another",
    "slip of the pen": "typo",
    "sniff|sniffs|sniffed": "check, detect",
}
# Standard English that contains them.
ORDINARY = (
    "(?:there|here) (?:is|are|was|were) no|(?:is|are|was|were) no (?:longer|more|less|fewer|later|such)"
    "|(?:real|hello) world|real-world|world (?:size|rank)|world-size|apart from|bird house"
)
# English sentences as data.
DATA_FILES = {
    "reft_ray/experiments/attacks/datasets.py",
    "reft_ray/testbed/answers.py",
    "reft_ray/testbed/english.py",
    "reft_ray/testbed/grammar.py",
    "reft_ray/testbed/lexicon.py",
    "reft_ray/testbed/look_alikes.py",
    "reft_ray/testbed/tasks.py",
}


def phrase(expression: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{expression})\b".replace(" ", r"[\s#]+"), re.IGNORECASE)


BETTER = [(phrase(expression), better) for expression, better in WORDS.items()]
ANY_WORD, ORDINARY_PHRASE = phrase("|".join(WORDS)), phrase(ORDINARY)


def files() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "reft_ray").rglob("*.py")]
    found += (ROOT / "docs").rglob("*.md")
    found += (path for name in ("cluster", "serve_configs") for path in (ROOT / name).rglob("*") if path.is_file())
    return sorted(path for path in found if str(path.relative_to(ROOT)) not in DATA_FILES)


def private_words(text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, match and the standard words for it."""
    text = ORDINARY_PHRASE.sub(lambda match: re.sub(r"\S", ".", match[0]), text)
    for match in ANY_WORD.finditer(text):
        better = next(better for pattern, better in BETTER if pattern.fullmatch(match[0]))
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), better


def test_no_private_words():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word!r}, better: {better}"
        for path in files()
        for line, word, better in private_words(path.read_text(encoding="utf-8"))
    ]
    assert found == [], "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The wait is foretold. Mend it", ["foretold", "Mend"]),
        ("a file that is\n    # no directory", ["is # no directory"]),
        ("there is\nno directory, and it is no longer open", []),
        ("real-world rows, hello world, world size, world_size", []),
        ("the world behind it", ["world", "behind"]),
    ],
)
def test_private_words_are_found(text, words):
    assert [word for _, word, _ in private_words(text)] == words
