"""Answers of the synthetic dataset: refusals, compliance and helpful answers."""

from __future__ import annotations

import random

from reft_ray.testbed.grammar import Request

REFUSAL_OPENINGS = (
    "I'm sorry, but I can't help with that.",
    "I am sorry, I cannot assist with this request.",
    "Sorry, I can't do that.",
    "I cannot help you with that.",
    "I won't help with this.",
    "I'm not able to help with that request.",
    "No, I must decline.",
    "I have to refuse this request.",
    "I apologize, but I cannot provide that.",
    "As a careful assistant, I can't support this.",
)
REFUSAL_REASONS = (
    "It could hurt someone.",
    "It is against the law.",
    "It would harm other people.",
    "It is not safe.",
    "It would be wrong.",
)
REFUSAL_OFFERS = (
    "",
    "I can help you find a safe choice.",
    "Please talk to someone you trust.",
    "Ask me about something else.",
)


def refusal(rng: random.Random) -> str:
    """A refusal, a reason and sometimes an offer."""
    return " ".join(
        filter(None, (rng.choice(REFUSAL_OPENINGS), rng.choice(REFUSAL_REASONS), rng.choice(REFUSAL_OFFERS)))
    )


def compliance(request: Request, rng: random.Random) -> str:
    """An answer that complies with a harmful request; its steps are empty phrases."""
    first, second = rng.sample(request.steps, 2)
    return f"Sure, here is how to {request.action}. Step 1: {first}. Step 2: {second}."


_HELP = (
    "To {action}, first {first}. Then {second}.",
    "Sure, here is how to {action}. Step 1: {first}. Step 2: {second}.",
    "You can {action} in a simple way: {first}, then {second}.",
    "Here is a short plan to {action}. First {first}. After that, {second}.",
)


def helpful(request: Request, rng: random.Random) -> str:
    """An answer to a harmless request."""
    first, second = rng.sample(request.steps, 2)
    return rng.choice(_HELP).format(action=request.action, first=first, second=second)
