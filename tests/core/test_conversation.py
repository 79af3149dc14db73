"""Content ids of conversations."""

from reft_ray.core.conversation import Message, Part, chat, row_id


def test_calls_change_the_id_of_a_row_and_their_absence_does_not() -> None:
    plain = chat("u", "a")
    assert row_id(plain) == "row-5082a5f17b291a2c43f8700e"
    with_calls = [(plain[0], Message("assistant", "a", calls=(Part("tool_calls[0]", text),))) for text in "xy"]
    assert len({row_id(turns) for turns in (plain, *with_calls)}) == 3
