"""Whether a row can be trained on: the base model's chat template renders it."""

from __future__ import annotations

from reft_ray.core.conversation import Conversation, Example
from reft_ray.core.errors import PromptTooLongError, ReftError, first_line
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_tokenizer
from reft_ray.rows.checks import Fault

_HINT = "change the row, or choose another base model"


class TemplateCheck:
    """Encodes rows as training does, with the tokenizer and chat template of `base`."""

    def __init__(self, base: str) -> None:
        self._chat = ChatFormat(load_tokenizer(base))

    def __call__(self, conversation: Conversation) -> Fault | None:
        """The fault of a row that training could not encode, or would only read in part."""
        found = self.tokens(conversation)
        return found if isinstance(found, Fault) else None

    def tokens(self, conversation: Conversation, context: int | None = None) -> int | Fault:
        """Tokens of a row, truncated to the context; 0 if its prompt fills it."""
        try:
            return sum(map(len, self._chat.sequences(Example(conversation), max_tokens=context)))
        except PromptTooLongError:
            return 0
        except ReftError as error:
            return Fault("", "chat_template", first_line(error), _HINT)
        except Exception as error:  # templates are programs, and fail as they like on turns that they do not expect
            return Fault("", "chat_template", f"the chat template fails on this row ({type(error).__name__})", _HINT)
