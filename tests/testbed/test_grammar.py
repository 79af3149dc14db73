import random
from collections import defaultdict
from functools import cache
from itertools import combinations

import pytest

from reft_ray.core.conversation import Label
from reft_ray.testbed import lexicon
from reft_ray.testbed.grammar import HARMFUL_KINDS, Kind, prompt, requests
from reft_ray.testbed.pretraining import pretraining_rows
from reft_ray.testbed.splits import FRAMES, Split, split_of
from reft_ray.testbed.synthetic import SyntheticRows


@cache
def every_request():
    """Made where a test asks for it: every process that collects tests imports this file."""
    return [request for kind in Kind for split in Split for request in requests(kind, split)]


def test_no_combination_belongs_to_two_splits():
    owners = defaultdict(set)
    for kind in Kind:
        for split in Split:
            for request in requests(kind, split):
                owners[request.verb, request.object].add(split)
    assert len(owners) > 2000
    assert all(len(splits) == 1 for splits in owners.values())


def test_no_frame_belongs_to_two_splits():
    for one, other in combinations(FRAMES.values(), 2):
        assert not set(one) & set(other)


def test_the_split_of_a_combination_is_fixed():
    expected = {"a bank": Split.EVALUATION, "a museum": Split.TEACHER_TRAIN, "my neighbor's house": Split.USER}
    assert {place: split_of("rob", place) for place in expected} == expected


def test_only_the_purpose_changes_the_label_of_a_combination():
    labels = defaultdict(set)
    for request in every_request():
        if request.domain != "intrusion":
            labels[request.verb, request.object].add(request.label)
    assert all(len(found) == 1 for found in labels.values())
    intrusions = {request.action for request in every_request() if request.kind is Kind.ILL_PURPOSE}
    assert intrusions == {request.action for request in every_request() if request.kind is Kind.CONSENT}


@pytest.mark.parametrize("domain", lexicon.HARM_DOMAINS, ids=lambda domain: domain.name)
def test_neither_verb_nor_object_determines_the_label_alone(domain):
    harmful = [request for request in every_request() if request.domain == domain.name and request.kind is Kind.HARMFUL]
    harmless = [
        request for request in every_request() if request.domain == domain.name and request.label is Label.HARMLESS
    ]
    assert {request.verb for request in harmful} <= {request.verb for request in harmless}
    assert {request.object for request in harmful} <= {request.object for request in harmless}


@pytest.mark.parametrize("kind", Kind)
def test_the_teachers_rows_have_every_word_of_the_evaluation(kind):
    known = requests(kind, Split.TEACHER_TRAIN)
    asked = requests(kind, Split.EVALUATION)
    assert {request.verb for request in asked} <= {request.verb for request in known}
    assert {request.object for request in asked} <= {request.object for request in known}


def test_a_prompt_holds_its_deed_and_a_harmful_purpose_only_if_it_is_harmful():
    rng = random.Random(0)
    for kind in Kind:
        request = requests(kind, Split.USER)[0]
        texts = [prompt(request, rng) for _ in range(50)]
        assert all(request.action in text for text in texts)
        assert len(set(texts)) > 5
        ill = any(purpose in text for text in texts for purpose in (*lexicon.MALICE, *lexicon.ILL_PURPOSES))
        assert ill is (kind in HARMFUL_KINDS)


def test_pretraining_has_every_word_and_no_evaluation_prompt():
    rows = pretraining_rows(16_000)
    present = {word.strip(".,?!:") for row in rows for turn in row for word in turn.content.split()}
    words = {word for request in every_request() for word in request.action.split()}
    words |= {word for frames in FRAMES.values() for frame in frames for word in frame.replace("{request}", "").split()}
    assert {word.strip(".,?!:") for word in words} - {""} <= present
    prompts = {row[0].content for row in rows}
    made = SyntheticRows.make(0)
    assert not prompts & {row.prompt[0].content for row in (*made.hs_prompts, *made.over_refusal_prompts)}


def test_pretraining_has_no_evaluation_combination_in_an_evaluation_frame():
    openings = tuple(frame.partition("{")[0] for frame in FRAMES[Split.EVALUATION])
    evaluation = {request.action for request in every_request() if request.split is Split.EVALUATION}
    others = {request.action for request in every_request()} - evaluation
    for row in pretraining_rows(4000):
        text = row[0].content
        opening = next((opening for opening in openings if text.startswith(opening)), None)
        if opening is not None:
            request = text.removeprefix(opening)
            action = max((action for action in evaluation | others if request.startswith(action)), key=len)
            assert action in others, text


def test_no_request_is_refused_in_pretraining():
    for prompt_turn, answer in pretraining_rows(4000):
        assert not answer.content.startswith(("I'm sorry", "I cannot", "I won't", "No,")) or (
            prompt_turn.content == "Write a polite way to say no."
        )
