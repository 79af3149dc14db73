"""Tokens of training files, as training encodes them."""

import json

from reft_ray.core.conversation import Example
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_tokenizer
from reft_ray.pipeline.token_count import TokenizerCounter
from reft_ray.rows.text import conversation_from


def line(*turns):
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}).encode() + b"\n"


ROWS = [line(("user", "how can i bake bread " * n), ("assistant", "here is how")) for n in range(1, 9)]


def tokens(base, row):
    return len(ChatFormat(load_tokenizer(str(base))).encode(Example(conversation_from(json.loads(row)["messages"]))))


def test_a_file_is_counted_as_it_is_trained_on(llama):
    counter = TokenizerCounter({"tiny": str(llama)})
    # Chunks end anywhere; invalid rows count as 0 tokens.
    content = b"".join(ROWS) + b"\n" + b'{"messages": 1}\n'
    size = counter("tiny", [content[:70], content[70:]])
    assert (size.rows, size.tokens, size.exact) == (9, sum(tokens(llama, row) for row in ROWS), True)


def test_a_large_file_is_extrapolated_from_its_first_rows(llama):
    counter = TokenizerCounter({"tiny": str(llama)}, exact_rows=2)
    size = counter("tiny", [b"".join(ROWS[:2] * 50)])
    assert (size.rows, size.exact) == (100, False)
    assert size.tokens == 50 * sum(tokens(llama, row) for row in ROWS[:2])


def test_other_formats_are_estimated_from_their_bytes(llama):
    size = TokenizerCounter({"tiny": str(llama)})("tiny", [b"PAR1" + bytes(396)])
    assert (size.tokens, size.exact) == (100, False)
