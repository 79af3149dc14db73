"""The checks of each row format: all faults of a row, each with a code, its path and a hint.

Rows are read for training (in a dataset) or for judging alone (over HTTP, labelled prompts). For judging, an answer
may be missing, turns may have other keys (their text is judged as well) and `content` may be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from reft_ray.core.conversation import ROLES
from reft_ray.rows.format import SHAREGPT_ROLES, Format, Row
from reft_ray.rows.text import is_text_part, media_keys

_COMMON_KEYS = frozenset({"role", "content", "name"})
ROLE_KEYS: Mapping[str, frozenset[str]] = {
    "system": _COMMON_KEYS,
    "developer": _COMMON_KEYS,
    "user": _COMMON_KEYS,
    "assistant": _COMMON_KEYS | {"weight", "tool_calls", "function_call", "refusal"},
    "tool": frozenset({"role", "content", "tool_call_id", "name"}),
}


class Fault(NamedTuple):
    """One error inside a row; `path` is the place in the row, empty for the row itself."""

    path: str
    code: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.path}: " if self.path else ""
        return f"{place}{self.message}" + (f" ({self.hint})" if self.hint else "")


class _Codes(NamedTuple):
    """Codes that OpenAI's file validator and the screening API name differently; both are public."""

    not_an_object: str
    no_content: str
    wrong_content: str
    not_a_text_part: str


_TRAINING = _Codes("data_type", "message_missing_key", "missing_content", "unsupported_content")
_JUDGING = _Codes("message_missing_key", "missing_content", "data_type", "data_type")


def check_chat(row: Row, judging: bool = False) -> list[Fault]:
    """OpenAI chat rows: `{"messages": [...]}`."""
    messages = row.get("messages")
    return [] if _plainly_valid(messages) else message_faults(messages, "messages", judging=judging)


def _plainly_valid(messages: Any) -> bool:
    """The common case, decided fast: two keys per turn, known roles, text, an answer."""
    if type(messages) is not list:
        return False
    answered = False
    for turn in messages:
        if type(turn) is not dict or len(turn) != 2:
            return False
        role = turn.get("role")
        content = turn.get("content")
        if type(content) is not str or not content or type(role) is not str or role == "tool" or role not in ROLE_KEYS:
            return False
        answered = answered or role == "assistant"
    return answered


def message_faults(messages: Any, path: str, needs_answer: bool = True, judging: bool = False) -> list[Fault]:
    """Every fault of a list of OpenAI messages."""
    if not isinstance(messages, list) or not messages:
        return [Fault(path, "missing_messages_list", f"{path} is not a non-empty list", "give a list of messages")]
    faults: list[Fault] = []
    for index, turn in enumerate(messages):
        faults += _turn_faults(turn, f"{path}[{index}]", judging)
    needs_answer = needs_answer and not judging
    if needs_answer and not any(isinstance(turn, Mapping) and turn.get("role") == "assistant" for turn in messages):
        hint = "add the answer to train on"
        faults.append(Fault(path, "example_missing_assistant_message", "no assistant message", hint))
    return faults


def _turn_faults(turn: Any, path: str, judging: bool) -> list[Fault]:
    codes = _JUDGING if judging else _TRAINING
    if not isinstance(turn, Mapping):
        return [Fault(path, codes.not_an_object, "the message is not a dictionary")]
    present = {key for key, value in turn.items() if value is not None}
    faults = []
    role = turn.get("role")
    if role is None:
        faults.append(Fault(path, "message_missing_key", "the message has no role", f"one of {', '.join(ROLES)}"))
    elif not isinstance(role, str) or role not in ROLE_KEYS:
        shown = role if isinstance(role, str) and len(role) <= 24 else "it"
        hint = f"one of {', '.join(ROLES)}"
        faults.append(Fault(f"{path}.role", "unrecognized_role", f"{shown} is not a role", hint))
    elif not judging and (unknown := sorted(map(str, present - ROLE_KEYS[role]))):
        hint = f"{role} messages have the keys {', '.join(sorted(ROLE_KEYS[role]))}"
        faults += [
            Fault(f"{path}.{key}", "message_unrecognized_key", f"unknown key {key[:40]}", hint) for key in unknown
        ]
    if judging:
        faults += media_faults(turn, f"{path}.")
    else:
        if role == "tool" and "tool_call_id" not in present:
            faults.append(Fault(path, "message_missing_key", "a tool message needs tool_call_id"))
        if "weight" in present and (isinstance(turn["weight"], bool) or turn["weight"] not in (0, 1)):
            faults.append(Fault(f"{path}.weight", "invalid_weight", "weight is neither 0 nor 1"))
    return faults + _content_faults(turn, f"{path}.content", judging, codes)


def _content_faults(turn: Mapping[str, Any], path: str, judging: bool, codes: _Codes) -> list[Fault]:
    content = turn.get("content")
    if not content and (turn.get("tool_calls") is not None or turn.get("function_call") is not None):
        return []
    if content is None and (judging or "content" not in turn):
        return [Fault(path.rpartition(".")[0], codes.no_content, "the message has no content")]
    if isinstance(content, list) and (content or judging):
        return [
            Fault(f"{path}[{index}]", codes.not_a_text_part, "only parts of type text can be screened")
            for index, part in enumerate(content)
            if not is_text_part(part)
        ]
    if not isinstance(content, str) or not (content or judging):
        return [Fault(path, codes.wrong_content, "content is not a non-empty text", "give a text")]
    return []


def media_faults(values: Mapping[str, Any], path: str = "") -> list[Fault]:
    """The media in a row, or in a dictionary of it."""
    return [
        Fault(f"{path}{key}", "unsupported_content", "only text can be screened", "leave the row out")
        for key in media_keys(values)
    ]


def check_sharegpt(row: Row, judging: bool = False) -> list[Fault]:
    """ShareGPT rows: `{"conversations": [{"from": "human", "value": "..."}]}`."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        return [Fault("conversations", "missing_messages_list", "conversations is not a non-empty list")]
    faults = _text_fault(row, "system", optional=True)
    answered = False
    for index, turn in enumerate(turns):
        path = f"conversations[{index}]"
        if not isinstance(turn, Mapping):
            faults.append(Fault(path, "data_type", "the turn is not a dictionary"))
            continue
        faults += media_faults(turn, f"{path}.")
        role = turn.get("from")
        if role is None:
            faults.append(Fault(path, "message_missing_key", "the turn has no from"))
        elif not isinstance(role, str) or role not in SHAREGPT_ROLES:
            hint = f"one of {', '.join(SHAREGPT_ROLES)}"
            faults.append(Fault(f"{path}.from", "unrecognized_role", "unknown speaker", hint))
        answered = answered or (isinstance(role, str) and SHAREGPT_ROLES.get(role) == "assistant")
        if not isinstance(turn.get("value"), str) or not turn["value"]:
            faults.append(Fault(f"{path}.value", "missing_content", "value is not a non-empty text"))
    if not answered and not judging:
        faults.append(Fault("conversations", "example_missing_assistant_message", "no gpt turn"))
    return faults


def check_alpaca(row: Row, _: bool = False) -> list[Fault]:
    """Alpaca rows: `{"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[q, a]]}`."""
    faults = _text_fault(row, "instruction") + _text_fault(row, "output")
    faults += _text_fault(row, "input", optional=True) + _text_fault(row, "system", optional=True)
    history = row.get("history")
    if history is not None and not (
        isinstance(history, list)
        and all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn) for turn in history)
    ):
        faults.append(Fault("history", "data_type", "history is not a list of [question, answer] texts"))
    return faults


def check_preference(row: Row, judging: bool = False) -> list[Fault]:
    """Preference pairs: OpenAI's `input/preferred_output/non_preferred_output`, or `prompt/chosen/rejected`."""
    styles = [{"chosen", "rejected"} & row.keys(), {"preferred_output", "non_preferred_output"} & row.keys()]
    if all(styles):
        message = f"the row has both {min(styles[0])} and {min(styles[1])}"
        return [Fault("", "ambiguous_keys", message, "keep the answers under one pair of names")]
    if styles[0]:
        faults = _turns_fault(row, "chosen", judging) + _turns_fault(row, "rejected", judging)
        prompt = row.get("prompt") is not None
        return faults + (_turns_fault(row, "prompt", judging, needs_answer=False) if prompt else [])
    source = row.get("input")
    if not isinstance(source, Mapping):
        faults = [Fault("input", "missing_messages_list", "input is not a dictionary with messages")]
    else:
        faults = message_faults(source.get("messages"), "input.messages", needs_answer=False, judging=judging)
        faults += media_faults(source, "input.")
    answers = ("preferred_output", "non_preferred_output")
    return faults + [fault for key in answers for fault in _turns_fault(row, key, judging)]


def _pair(prompt: str, answer: str | None = None) -> Callable[[Row, bool], list[Fault]]:
    def check(row: Row, judging: bool = False) -> list[Fault]:
        faults = _turns_fault(row, prompt, judging, needs_answer=False)
        return faults + (_turns_fault(row, answer, judging, optional=judging) if answer else [])

    return check


def _turns_fault(row: Row, key: str, judging: bool, needs_answer: bool = True, optional: bool = False) -> list[Fault]:
    value = row.get(key)
    if isinstance(value, list) and value:
        return message_faults(value, key, needs_answer, judging)
    return _text_fault(row, key, optional)


def _text_fault(row: Row, key: str, optional: bool = False) -> list[Fault]:
    value = row.get(key)
    if optional and value is None:
        return []
    if value is None:
        return [Fault(key, "missing_field", f"the row has no {key}")]
    if not isinstance(value, str):
        return [Fault(key, "data_type", f"{key} is not a text")]
    if not value and not optional:
        return [Fault(key, "missing_content", f"{key} is empty", "give a text")]
    return []


CHECKS: Mapping[Format, Callable[[Row, bool], list[Fault]]] = {
    Format.CHAT: check_chat,
    Format.SHAREGPT: check_sharegpt,
    Format.ALPACA: check_alpaca,
    Format.COMPLETION: _pair("prompt", "completion"),
    Format.RESPONSE: _pair("prompt", "response"),
    Format.PREFERENCE: check_preference,
    Format.PROMPT: _pair("prompt"),
    Format.TEXT: _pair("text"),
}
