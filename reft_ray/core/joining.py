"""Turns read on: a request, or a word, that is split over several turns of one role is also judged as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from reft_ray.core.conversation import Conversation, Part

_EDGE = 200
"""Characters of each end of a turn that are joined: a split request continues there."""
_ENDS = (".", "!", "?", "…", ";", ":", "。", "！", "？", ")", '"', "”")


def joined_turns(conversation: Conversation) -> Iterator[tuple[Part, str]]:
    """(the last turn, text) of turns of one role that stop without an end and are continued by the next.

    Each run of such turns is joined twice, with blanks and, where a word may be split, without. A turn gives at most
    its edges, so the texts together are at most twice as long as the conversation.
    """
    for role in dict.fromkeys(turn.role for turn in conversation):
        run: list[str] = []
        last = Part(f"messages[0].{role}", "")
        for index, turn in enumerate(conversation):
            text = turn.content.strip()
            if turn.role != role or not text:
                continue
            if run and run[-1].endswith(_ENDS):
                yield from _joined(last, run)
                run = []
            run.append(text)
            last = Part(f"messages[{index}].{role}", turn.content)
        yield from _joined(last, run)


def _joined(last: Part, run: list[str]) -> Iterator[tuple[Part, str]]:
    if len(run) < 2:
        return
    edges = [run[0][-_EDGE:], *map(_edges, run[1:-1]), run[-1][:_EDGE]]
    yield last, " ".join(edges)
    if any(one[-1].isalnum() and other[0].isalnum() for one, other in pairwise(edges)):
        yield last, "".join(edges)


def _edges(text: str) -> str:
    return text if len(text) <= 2 * _EDGE else f"{text[:_EDGE]} {text[-_EDGE:]}"
