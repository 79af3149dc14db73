"""Guards that generate a reply: a local chat model, or one on an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from reft_ray.core.cascade import Opinion
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import ReftError
from reft_ray.evaluation.answer_text import without_reasoning
from reft_ray.evaluation.endpoint import Endpoint
from reft_ray.guards.exchanges import exchanges
from reft_ray.guards.formats import Question, Reading, ReplyFormat
from reft_ray.guards.taxonomy import opinion

Replies = Callable[[Sequence[Question], int], Sequence[str]]
"""(questions, most tokens of a reply) to one reply per question, in order."""

PARALLEL = 8


class ReplyGuard:
    """Asks about every exchange of a conversation (`exchanges`); the most harmful one counts.

    Exchanges longer than `characters` are judged in windows. Raises ReftError for a reply in another format.
    """

    def __init__(
        self, guard_id: str, replies: Replies, form: ReplyFormat, threshold: float = 0.5, characters: int = 16_000
    ) -> None:
        self.guard_id = guard_id
        self.threshold = threshold
        self._replies = replies
        self._form = form
        self._characters = characters

    def opinions(self, conversations: Sequence[Conversation]) -> list[Opinion]:
        """One Opinion per conversation, in order; a conversation without text counts as harmful."""
        asked: dict[Question, int] = {}
        rows = [
            [
                (exchange.part, [asked.setdefault(question, len(asked)) for question in self._form.ask(exchange)])
                for exchange in exchanges(conversation, self._characters)
            ]
            for conversation in conversations
        ]
        questions = list(asked)
        replies = self._replies(questions, self._form.tokens) if questions else []
        if len(replies) != len(questions):
            raise ReftError(f"guard {self.guard_id}: {len(questions)} questions, {len(replies)} replies")
        read = [self._read(question, reply) for question, reply in zip(questions, replies, strict=True)]
        return [self._worst(row, read) for row in rows]

    def _read(self, question: Question, reply: str) -> Reading:
        try:
            found = self._form.read(without_reasoning(reply).strip())
        except (ValueError, TypeError):
            raise ReftError(
                f"guard {self.guard_id}: a reply has another format than this guard's; check that `format` names the "
                "model's family"
            ) from None
        labels = (question.label,) if question.label and found.probability >= self.threshold else found.labels
        return Reading(found.probability, labels)

    def _worst(self, row: Sequence[tuple[str, Sequence[int]]], read: Sequence[Reading]) -> Opinion:
        if not row:
            return Opinion(1.0)
        found = [(part, read[index]) for part, indices in row for index in indices]
        part, (probability, _) = max(found, key=lambda item: item[1][0])
        labels = [label for _, (harm, labels) in found if harm >= self.threshold for label in labels]
        return opinion(probability, labels, self._form.labels, part)


class EndpointReplies:
    """Replies of an endpoint, PARALLEL at a time: `/chat/completions` for messages, `/completions` for raw prompts."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="guard")

    def __call__(self, questions: Sequence[Question], tokens: int) -> list[str]:
        return list(self._pool.map(lambda question: self._ask(question, tokens), questions))

    def _ask(self, question: Question, tokens: int) -> str:
        body = {"temperature": 0, "max_tokens": tokens}
        if question.raw:
            document = self._endpoint.post("completions", {"prompt": question.raw, **body})
        else:
            turns = [{"role": turn.role, "content": turn.content} for turn in question.messages]
            document = self._endpoint.post("chat/completions", {"messages": turns, **body})
        try:
            choice = document["choices"][0]
            reply = choice["text"] if question.raw else choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            reply = None
        if not isinstance(reply, str):
            raise ReftError(f"the guard at {self._endpoint.url} sent a completion without text")
        return reply
