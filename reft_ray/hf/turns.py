"""Turns as a chat template reads them, and the check that it has rendered all of them.

Templates drop what they do not know: a tool call (Phi-3), the text next to a call (Llama 3), a role. Such a row is
refused, because the student would learn another dialogue than the one that was screened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

from reft_ray.core.conversation import Conversation, Message
from reft_ray.core.errors import ReftError

Cut = Callable[[str, str], str]
"""Content and role -> content without control tokens (`control_tokens.ControlTokens.cut`)."""

_THOUGHT = re.compile(r"\A\s*<think>(.*?)</think>\s*(.*)\Z", re.DOTALL)


def reasoning_and_answer(turn: Message, cut: Cut) -> tuple[str, str]:
    """(reasoning, answer) of a turn: `<think>...</think>` at its beginning, or its `reasoning_content`; often empty."""
    content = cut(turn.content, turn.role)
    if turn.role != "assistant":
        return "", content
    if given := str(turn.values.get("reasoning_content") or "").strip():
        return cut(given, turn.role), content
    found = _THOUGHT.match(content)
    return (found[1].strip(), found[2]) if found and found[1].strip() else ("", content)


def template_turns(messages: Sequence[Message], cut: Cut, splits_reasoning: bool) -> list[dict[str, Any]]:
    """Messages as dictionaries for the template; arguments of tool calls are values, not JSON in text.

    With `splits_reasoning` an answer's reasoning is a value of its own, which transformers also names `thinking`.
    Raises ReftError for a malformed tool call.
    """
    turns = []
    for index, turn in enumerate(messages):
        values: dict[str, Any] = {"role": turn.role, "content": cut(turn.content, turn.role)}
        reasoning, answer = reasoning_and_answer(turn, cut)
        more = turn.values
        if reasoning and (splits_reasoning or "reasoning_content" in more):
            values |= {"reasoning_content": reasoning, "content": answer}
        for key in ("name", "tool_call_id"):
            if key in more:
                values[key] = cut(str(more[key]), "user")
        if calls := _calls(more, f"messages[{index}]"):
            values["tool_calls"] = _cut_all(calls, cut)
        elif any(call.name.partition("[")[0] in ("tool_calls", "function_call") for call in turn.calls):
            raise ReftError(f"messages[{index}] has a tool call that cannot be read")
        turns.append(values)
    return turns


def tools_of(messages: Sequence[Message], cut: Cut) -> list[dict[str, Any]] | None:
    """The tool definitions of a conversation, None without any. Raises ReftError unless they are functions."""
    found = messages[0].values.get("tools") if messages else None
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            found = [found]
    if not found:
        return None
    listed = found if isinstance(found, list) else [found]
    tools = [{"type": "function", "function": tool} if _named(tool) else tool for tool in listed]
    if not all(isinstance(tool, dict) and _named(tool.get("function")) for tool in tools):
        raise ReftError("tools is not a list of functions with names")
    cut_tools: list[dict[str, Any]] = _cut_all(tools, cut)
    return cut_tools


def check_rendered(messages: Conversation, text: str, cut: Cut) -> None:
    """Raise ReftError for the first thing in these messages that is not in the rendered text."""
    for name, piece in _pieces(messages, cut):
        # A template may render a value as JSON.
        if piece not in text and json.dumps(piece, ensure_ascii=False)[1:-1] not in text:
            raise ReftError(f"the chat template does not render {name}")


def _pieces(messages: Conversation, cut: Cut) -> Iterator[tuple[str, str]]:
    for index, turn in enumerate(messages):
        name, more = f"messages[{index}]", turn.values
        # Templates leave the reasoning of earlier turns out; where it is trained, that is checked there.
        yield f"{name}.content", reasoning_and_answer(turn, cut)[1].strip()
        if "refusal" in more:
            yield f"{name}.refusal", str(more["refusal"]).strip()
        for at, call in enumerate(_calls(more, name)):
            function = _cut_all(call["function"], cut)
            yield f"{name}.tool_calls[{at}].name", str(function["name"])
            for leaf in _leaves(function.get("arguments")):
                yield f"{name}.tool_calls[{at}].arguments", leaf
    for tool in tools_of(messages, cut) or ():
        yield "tools", str(tool["function"]["name"])
        yield "tools", str(tool["function"].get("description") or "").strip()


def _calls(more: dict[str, Any], name: str) -> list[dict[str, Any]]:
    called = list(more.get("tool_calls") or ())
    if more.get("function_call"):
        called.append({"function": more["function_call"]})
    calls = []
    for index, call in enumerate(called):
        function = call.get("function") if isinstance(call, dict) else None
        if not _named(function):
            raise ReftError(f"{name}.tool_calls[{index}] is not a call of a function with a name")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                arguments = None
        if not isinstance(arguments, dict):
            raise ReftError(f"{name}.tool_calls[{index}]: the arguments are not a JSON object")
        kept = {"id": str(call["id"])} if call.get("id") else {}
        calls.append({**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _named(function: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])


def _cut_all(value: Any, cut: Cut) -> Any:
    """The value with every text and key in it cut."""
    if isinstance(value, str):
        return cut(value, "user")
    if isinstance(value, dict):
        return {cut(str(key), "user"): _cut_all(item, cut) for key, item in value.items()}
    return [_cut_all(item, cut) for item in value] if isinstance(value, list) else value


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value.strip()
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)
