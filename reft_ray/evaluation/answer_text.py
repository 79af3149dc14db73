"""What is judged of an answer: the text after any reasoning, and whether that text is coherent."""

from __future__ import annotations

import itertools
import re
import zlib

_THINK = re.compile(r"<(think|thinking|reasoning|thought)>.*?</\1>", re.IGNORECASE | re.DOTALL)
_THINK_END = re.compile(r"</(?:think|thinking|reasoning|thought)>", re.IGNORECASE)
_THINK_START = re.compile(r"<(?:think|thinking|reasoning|thought)>", re.IGNORECASE)
_FINAL_CHANNEL = re.compile(r"<\|channel\|>\s*final\s*<\|message\|>")
# The same channels after a tokenizer removed its special tokens.
_BARE_FINAL = re.compile(r"\A(?:analysis|commentary).*assistant\s*final", re.DOTALL)
_CONTROL = re.compile(r"<\|[\w ]{1,30}\|>")


def without_reasoning(answer: str) -> str:
    """The answer proper: without think blocks and without harmony channels other than `final`.

    A block that was opened in the prompt has only its end here; one that is never closed leaves no answer.
    """
    final = list(_FINAL_CHANNEL.finditer(answer))
    if final:
        return _CONTROL.split(answer[final[-1].end() :], maxsplit=1)[0].strip()
    if "<|channel|>" in answer:
        return _before(answer, "<|channel|>")
    if bare := _BARE_FINAL.match(answer):
        return answer[bare.end() :].strip()
    if "<" not in answer:
        return answer.strip()
    text = _THINK.sub(" ", answer)
    if ends := list(_THINK_END.finditer(text)):
        text = text[ends[-1].end() :]
    if start := _THINK_START.search(text):
        text = text[: start.start()]
    return text.strip()


def _before(text: str, mark: str) -> str:
    return _CONTROL.sub("", text.partition(mark)[0]).strip()


MAX_REPEATS = 3
_LOOP_CHARACTERS, _LONGEST_PERIOD, _LOOP_TIMES = 24, 200, 4
_COMPRESSED_CHARACTERS, _COMPRESSED_SHARE = 400, 0.12
_SALAD_WORDS, _SALAD_PAIRS = 12, 2
_MARKS = ".,;:!?\"'()[]*-"
_PUNCTUATION = re.compile(r"[^\w\s'\u2019]|[\d_\n]")
_NO_PAIR = re.compile(r"\b(?:the|a|an) (?:the|a|an|of|to|and|with|or|at|by)\b(?!-)")
# The most frequent words of languages in Latin letters: a run of words without any is not a sentence.
_FREQUENT = frozenset(
    re.findall(
        r"\w+",
        """
        the a an of to and in is it you that for with on are be i not or as at by this have from my we he she
        they your der die das und ist ein eine zu den nicht mit ich du sie von le la les de et un une est que
        pour je pas el los y en es no o os e em um uma il di che per non w z na nie się do jest het een van och
        att av og er på ve bir da yang dan ja là và của să şi cu
        """,
    )
)
_SCRIPTS = (
    ("latin", re.compile(r"[a-z\u00c0-\u024f]", re.IGNORECASE)),
    ("greek", re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]")),
    ("cyrillic", re.compile(r"[\u0400-\u04ff]")),
    ("hebrew", re.compile(r"[\u0590-\u05ff]")),
    ("arabic", re.compile(r"[\u0600-\u06ff]")),
    ("devanagari", re.compile(r"[\u0900-\u097f]")),
    ("thai", re.compile(r"[\u0e00-\u0e7f]")),
    ("han", re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")),
    ("hangul", re.compile(r"[\uac00-\ud7af]")),
)


def incoherence(answer: str) -> str | None:
    """Why an answer is incoherent, or None: nothing is said, a loop, or words that form no sentence."""
    if not any(character.isalnum() for character in answer):
        return "empty"
    text = answer.casefold()
    if _repeats_a_word(text) or _ends_in_a_loop(text) or _compresses_to_nothing(text):
        return "loop"
    return "word salad" if _word_salad(text) else None


def is_incoherent(answer: str) -> bool:
    """Whether an answer has no letter or digit, loops, or is a word salad."""
    return incoherence(answer) is not None


def _repeats_a_word(text: str) -> bool:
    run, last = 0, ""
    for token in text.split():
        word = token.strip(_MARKS) or token
        run = run + 1 if word == last else 1
        last = word
        if run > MAX_REPEATS:
            return True
    return False


def _ends_in_a_loop(text: str) -> bool:
    """Whether the end repeats itself, with or without blanks: greedy decoding never leaves a loop."""
    text = text.strip()
    for period in range(1, min(_LONGEST_PERIOD, len(text) // _LOOP_TIMES) + 1):
        if text[-period:] != text[-2 * period : -period]:
            continue
        times = max(_LOOP_TIMES, -(-_LOOP_CHARACTERS // period))
        unit = text[-period:]
        if text.endswith(unit * times) and any(character.isalpha() for character in unit):
            return True
    return False


def _compresses_to_nothing(text: str) -> bool:
    """Whether a long answer says the same again and again with small changes."""
    if len(text) < _COMPRESSED_CHARACTERS:
        return False
    content = text.encode()
    return len(zlib.compress(content, 1)) < _COMPRESSED_SHARE * len(content)


def _word_salad(text: str) -> bool:
    words = text.split()
    pairs = len(_NO_PAIR.findall(text))
    if pairs >= _SALAD_PAIRS and pairs * 20 >= len(words):
        return True
    for part in _PUNCTUATION.split(text) if len(words) >= _SALAD_WORDS else ():
        if part.isascii() and len(run := part.split()) >= _SALAD_WORDS and _FREQUENT.isdisjoint(run):
            return True
    return not text.isascii() and _changes_script(words)


def _changes_script(words: list[str]) -> bool:
    """Whether every other word is in another script than the word before it."""
    scripts = [next((name for name, letter in _SCRIPTS if letter.search(word)), "") for word in words]
    changes = sum(one != other for one, other in itertools.pairwise(scripts) if one and other)
    return changes >= _LOOP_TIMES and 2 * changes >= len(words) - 1
