"""The checks of each row format: all faults of a row, each with a code, its path and a hint.

Rows are read for training (in a dataset) or for judging alone (over HTTP, labelled prompts). For judging, an answer
may be missing, turns may have other keys (their text is judged as well) and `content` may be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

import orjson

from reft_ray.core.conversation import ROLES
from reft_ray.rows.format import DIALOGUE, Format, Row, option
from reft_ray.rows.layout import holds_prompt, prompt_key
from reft_ray.rows.text import is_text_part, media_keys
from reft_ray.rows.turns import SPEAKERS, Turn, openai_turn, role_of, tag_of

_COMMON_KEYS = frozenset({"role", "content", "name"})
ROLE_KEYS: Mapping[str, frozenset[str]] = {
    "system": _COMMON_KEYS,
    "developer": _COMMON_KEYS,
    "user": _COMMON_KEYS,
    "assistant": _COMMON_KEYS
    | {"weight", "tool_calls", "function_call", "refusal", "annotations", "audio", "reasoning_content"},
    "tool": frozenset({"role", "content", "tool_call_id", "name"}),
    "function": _COMMON_KEYS,
}
_ROLES = ", ".join((*ROLES, "function"))
Speakers = Mapping[str, str]


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


def check_dialogue(key: str) -> Callable[[Row, bool, Speakers], list[Fault]]:
    """Rows that are one dialogue: OpenAI's `{"messages": [...]}` and ShareGPT's `{"conversations": [...]}`."""

    def check(row: Row, judging: bool, speakers: Speakers) -> list[Fault]:
        turns = row.get(key)
        faults = [] if plainly_valid(turns) else message_faults(turns, key, judging=judging, speakers=speakers)
        return faults + _system_faults(row, turns)

    return check


def _system_faults(row: Row, turns: Any) -> list[Fault]:
    """The faults of a `system` next to a dialogue."""
    if row.get("system") is None:
        return []
    if faults := _text_fault(row, "system", optional=True):
        return faults
    own = [turn[tag_of(turn)[1]] for turn in _listed(turns) if isinstance(turn, Mapping) and _is_system(turn)]
    if not row["system"] or not own or own == [row["system"]]:
        return []
    return [Fault("system", "ambiguous_keys", "the row has a system text and a system turn", "keep one of them")]


def _is_system(turn: Turn) -> bool:
    speaker, text = tag_of(turn)
    return role_of(turn.get(speaker)) == "system" and text in turn


def plainly_valid(messages: Any) -> TypeGuard[list[dict[str, Any]]]:
    """The common case, decided fast: two keys per turn, known roles, text, an answer."""
    if type(messages) is not list:
        return False
    answered = False
    for turn in messages:
        if type(turn) is not dict or len(turn) != 2:
            return False
        role = turn.get("role")
        content = turn.get("content")
        if (
            type(content) is not str
            or not content
            or type(role) is not str
            or role in ("tool", "function")
            or role not in ROLE_KEYS
        ):
            return False
        answered = answered or role == "assistant"
    return answered


def message_faults(
    messages: Any, path: str, needs_answer: bool = True, judging: bool = False, speakers: Speakers = SPEAKERS
) -> list[Fault]:
    """Every fault of a list of turns, of OpenAI or ShareGPT."""
    if not isinstance(messages, list) or not messages:
        return [Fault(path, "missing_messages_list", f"{path} is not a non-empty list", "give a list of messages")]
    faults: list[Fault] = []
    for index, turn in enumerate(messages):
        faults += _turn_faults(turn, f"{path}[{index}]", judging, speakers)
    if needs_answer and not judging and not any(_answers(turn, speakers) for turn in messages):
        hint = "add the answer to train on"
        faults.append(Fault(path, "example_missing_assistant_message", "no assistant message", hint))
    return faults


def _answers(turn: Any, speakers: Speakers) -> bool:
    if not isinstance(turn, Mapping):
        return False
    speaker, _ = tag_of(turn)
    return (role_of(turn.get("from"), speakers) if speaker == "from" else turn.get("role")) == "assistant"


def _turn_faults(turn: Any, path: str, judging: bool, speakers: Speakers) -> list[Fault]:
    codes = _JUDGING if judging else _TRAINING
    if not isinstance(turn, Mapping):
        return [Fault(path, codes.not_an_object, "the message is not a dictionary")]
    speaker, text = tag_of(turn)
    if speaker == "from":
        return _sharegpt_faults(turn, path, judging, speakers)
    present = {key for key, value in turn.items() if value is not None}
    faults = []
    role = turn.get("role")
    if role is None:
        faults.append(Fault(path, "message_missing_key", "the message has no role", f"one of {_ROLES}"))
    elif not isinstance(role, str) or role not in ROLE_KEYS:
        shown = role if isinstance(role, str) and len(role) <= 24 else "it"
        known = role_of(role, speakers)
        hint = f"write {known}" if known else f"one of {_ROLES}"
        faults.append(Fault(f"{path}.role", "unrecognized_role", f"{shown} is not a role", hint))
    elif not judging:
        unknown = sorted(str(key) for key in present - ROLE_KEYS[role] if turn[key] not in ("", [], {}))
        hint = f"{role} messages have the keys {', '.join(sorted(ROLE_KEYS[role]))}"
        faults += [
            Fault(f"{path}.{key}", "message_unrecognized_key", f"unknown key {key[:40]}", hint) for key in unknown
        ]
    if judging or "audio" in present:
        faults += media_faults(turn, f"{path}.")
    if not judging:
        if role == "tool" and "tool_call_id" not in present:
            faults.append(Fault(path, "message_missing_key", "a tool message needs tool_call_id"))
        if "weight" in present and (isinstance(turn["weight"], bool) or turn["weight"] not in (0, 1)):
            faults.append(Fault(f"{path}.weight", "invalid_weight", "weight is neither 0 nor 1"))
    return faults + _call_faults(turn, path, judging) + _content_faults(turn, f"{path}.{text}", judging, codes)


def _call_faults(turn: Turn, path: str, judging: bool) -> list[Fault]:
    """Calls that no chat template can render; in text that is only judged they may have any shape."""
    calls = turn.get("tool_calls")
    if judging or calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        hint = "a list of {id, type, function: {name, arguments}}"
        return [Fault(f"{path}.tool_calls", "data_type", "tool_calls is not a list of dictionaries", hint)]
    try:
        orjson.dumps(calls)
    except orjson.JSONEncodeError:
        return [Fault(f"{path}.tool_calls", "data_type", "tool_calls are nested too deeply", "give arguments as JSON")]
    return []


def _sharegpt_faults(turn: Turn, path: str, judging: bool, speakers: Speakers) -> list[Fault]:
    faults = media_faults(turn, f"{path}.")
    tag = turn["from"]
    if tag is None:
        faults.append(Fault(path, "message_missing_key", "the turn has no from"))
    elif role_of(tag, speakers) is None:
        shown = tag if isinstance(tag, str) and len(tag) <= 24 and tag.isprintable() else "it"
        known = ", ".join(speakers)
        hint = f"known are {known}; or name its role with {option(speakers={shown: 'assistant'})}"
        faults.append(Fault(f"{path}.from", "unrecognized_role", f"unknown speaker {shown}", hint))
    if not isinstance(turn.get("value"), str) or not turn["value"]:
        faults.append(Fault(f"{path}.value", "missing_content", "value is not a non-empty text"))
    return faults


def _content_faults(turn: Turn, path: str, judging: bool, codes: _Codes) -> list[Fault]:
    content = turn.get("content")
    # A turn may consist of calls, or of a refusal.
    if not content and any(turn.get(key) for key in ("tool_calls", "function_call", "refusal")):
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


def check_alpaca(row: Row, _: bool, __: Speakers) -> list[Fault]:
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


def check_preference(row: Row, judging: bool, speakers: Speakers) -> list[Fault]:
    """Preference pairs: OpenAI's `input/preferred_output/non_preferred_output`, or `chosen/rejected` with a prompt."""
    styles = [{"chosen", "rejected"} & row.keys(), {"preferred_output", "non_preferred_output"} & row.keys()]
    if all(styles):
        message = f"the row has both {min(styles[0])} and {min(styles[1])}"
        return [Fault("", "ambiguous_keys", message, "keep the answers under one pair of names")]
    answers = ("chosen", "rejected") if styles[0] else ("preferred_output", "non_preferred_output")
    faults = [fault for key in answers for fault in _turns_fault(row, key, judging, speakers)]
    if not styles[0]:
        source = row.get("input")
        if not isinstance(source, Mapping):
            return [Fault("input", "missing_messages_list", "input is not a dictionary with messages"), *faults]
        asked = message_faults(source.get("messages"), "input.messages", False, judging, speakers)
        return [*asked, *media_faults(source, "input."), *faults]
    if key := prompt_key(row):
        return faults + _turns_fault(row, key, judging, speakers, needs_answer=False) + _system_faults(row, row[key])
    if faults or judging or holds_prompt([openai_turn(turn, speakers) for turn in _listed(row["chosen"])]):
        return faults + _system_faults(row, row.get("chosen"))
    hint = f"name the column with {option(columns={'prompt': 'COLUMN'})}"
    return [Fault("prompt", "missing_field", "the pair has no prompt", hint)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _pair(prompt: str, answer: str | None = None) -> Callable[[Row, bool, Speakers], list[Fault]]:
    def check(row: Row, judging: bool, speakers: Speakers) -> list[Fault]:
        faults = _turns_fault(row, prompt, judging, speakers, needs_answer=False) + _system_faults(row, row.get(prompt))
        return faults + (_turns_fault(row, answer, judging, speakers, optional=judging) if answer else [])

    return check


def _turns_fault(
    row: Row, key: str, judging: bool, speakers: Speakers, needs_answer: bool = True, optional: bool = False
) -> list[Fault]:
    value = row.get(key)
    if isinstance(value, list) and value:
        return message_faults(value, key, needs_answer, judging, speakers)
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


CHECKS: Mapping[Format, Callable[[Row, bool, Speakers], list[Fault]]] = {
    Format.CHAT: check_dialogue(DIALOGUE[Format.CHAT]),
    Format.SHAREGPT: check_dialogue(DIALOGUE[Format.SHAREGPT]),
    Format.ALPACA: check_alpaca,
    Format.COMPLETION: _pair("prompt", "completion"),
    Format.RESPONSE: _pair("prompt", "response"),
    Format.PREFERENCE: check_preference,
    Format.PROMPT: _pair("prompt"),
    Format.TEXT: _pair("text"),
}
