"""Text that may become a stop sequence is held back, at a cost bounded by the text, not by the sequence."""

from reft_ray.hf.text_stream import _overlap


class Counted(str):
    """A stop sequence that counts the beginnings taken of it."""

    taken = 0

    def __getitem__(self, key):
        self.taken += 1
        return super().__getitem__(key)


def test_the_beginning_of_a_stop_sequence_is_found_at_the_texts_end():
    assert [_overlap(text, ("abcab", "xy")) for text in ("", "ab", "cab", "abca", "zx", "abcb")] == [0, 2, 2, 4, 1, 0]


def test_a_long_stop_sequence_costs_no_more_than_the_text_is_long():
    stop = Counted("ab" * 50_000)
    assert _overlap("xab", [stop]) == 2
    assert stop.taken == 3
