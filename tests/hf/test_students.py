"""Students in service: answers as a plain greedy decode gives them, whatever else is computed beside them."""

import queue
from contextlib import nullcontext
from pathlib import Path

import pytest

from reft_ray.core.completion import Piece, Sampling
from reft_ray.core.conversation import chat
from reft_ray.core.errors import PromptTooLongError, ReftError
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.generate import Responder
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import LoraSettings, attach, attach_saved, merge, save_adapter
from reft_ray.hf.students import FullError, Students

PROMPTS = ["how can i bake bread", "tell me", "please help me to bake a car with that bread please", "sure"]
GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory) -> list[str]:
    """Three adapters that change what the base says."""
    folders = []
    for seed in range(3):
        model = attach(load_base(str(llama)).model, "student", LoraSettings(rank=4), seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
        folder = tmp_path_factory.mktemp(f"adapter-{seed}")
        save_adapter(model, "student", folder, str(llama))
        folders.append(str(folder))
    return folders


def local(uri: str):
    return nullcontext(Path(uri))


@pytest.fixture
def students(llama: Path):
    with Students(load_base(str(llama)), local, max_adapters=2, max_batch=2) as students:
        yield students


def listen(students: Students, adapter, prompt: str, sampling: Sampling = GREEDY):
    heard: queue.Queue = queue.Queue()
    return students.answer(adapter, chat(prompt), sampling, heard.put), heard


def whole(heard: queue.Queue) -> list[Piece]:
    pieces = []
    while True:
        item = heard.get(timeout=60)
        if isinstance(item, Exception):
            raise item
        pieces.append(item)
        if item.finish_reason:
            return pieces


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def expected(base: Path, adapter: str | None, max_tokens: int = 12) -> list[str]:
    loaded = load_base(str(base))
    model = merge(attach_saved(loaded.model, "student", Path(adapter))) if adapter else loaded.model
    return Responder(model, ChatFormat(loaded.tokenizer), max_tokens)([chat(prompt) for prompt in PROMPTS])


def test_many_conversations_on_many_adapters_get_what_each_would_get_alone(students, adapters, llama) -> None:
    models = [None, *adapters]
    asked = {
        (m, p): listen(students, model, prompt)[1] for p, prompt in enumerate(PROMPTS) for m, model in enumerate(models)
    }
    for m, model in enumerate(models):
        answers = [whole(asked[m, p]) for p in range(len(PROMPTS))]
        assert [text(pieces).strip() for pieces in answers] == expected(llama, model)
        chat_format = ChatFormat(load_base(str(llama)).tokenizer)
        for prompt, pieces in zip(PROMPTS, answers, strict=True):
            assert [piece.prompt_tokens > 0 for piece in pieces] == [True] + [False] * (len(pieces) - 1)
            assert pieces[0].prompt_tokens == len(chat_format.prompt(chat(prompt)))
            assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
            if pieces[-1].finish_reason == "length":
                assert sum(piece.tokens for piece in pieces) == 12
    assert len(students.adapters.loaded) == 2


def test_the_least_recently_used_adapter_goes_first(students, adapters) -> None:
    for adapter in (adapters[0], adapters[1], adapters[0], adapters[2]):
        whole(listen(students, adapter, "tell me")[1])
    assert students.adapters.loaded == [adapters[0], adapters[2]]


def test_a_missing_adapter_ends_its_own_answer_only(students, adapters, tmp_path) -> None:
    bad, good = listen(students, str(tmp_path), "tell me")[1], listen(students, adapters[0], "tell me")[1]
    with pytest.raises(ReftError, match="is missing"):
        whole(bad)
    assert whole(good)


def test_a_seed_makes_sampling_repeatable(students) -> None:
    warm = Sampling(max_tokens=12, temperature=1.5, top_p=0.9, seed=7)
    once, again = (text(whole(listen(students, None, "tell me", warm)[1])) for _ in range(2))
    assert once == again
    others = {text(whole(listen(students, None, "tell me", Sampling(12, 1.5, seed=seed))[1])) for seed in range(4)}
    assert len(others) > 1


def test_penalties_change_what_is_repeated(students, llama) -> None:
    plain = whole(listen(students, None, "tell me", Sampling(40, 0))[1])
    kept_apart = whole(listen(students, None, "tell me", Sampling(40, 0, frequency_penalty=2, presence_penalty=2))[1])
    assert len(set(text(kept_apart))) >= len(set(text(plain)))
    assert text(kept_apart) != text(plain)


def test_a_stop_sequence_is_never_told_not_even_a_part_of_it(students, adapters) -> None:
    found = {adapter: text(whole(listen(students, adapter, "tell me", Sampling(30, 0))[1])) for adapter in adapters}
    adapter, whole_answer = max(found.items(), key=lambda item: len(item[1]))
    assert len(whole_answer) > 4, found
    stop = whole_answer[2:5]
    pieces = whole(listen(students, adapter, "tell me", Sampling(30, 0, stop=(stop,)))[1])
    assert pieces[-1].finish_reason == "stop"
    assert text(pieces) == whole_answer[: whole_answer.find(stop)]


def test_an_answer_ends_with_the_context_and_a_prompt_must_leave_room(students) -> None:
    pieces = whole(listen(students, None, "tell me", Sampling(4096, 0, presence_penalty=-2))[1])
    assert sum(piece.tokens for piece in pieces) + pieces[0].prompt_tokens <= 256
    with pytest.raises(PromptTooLongError, match="holds 256 tokens, and the messages take"):
        listen(students, None, "how " * 300)


def test_a_cancelled_answer_frees_its_place(llama) -> None:
    with Students(load_base(str(llama)), local, max_rows=1, max_waiting=1) as students:
        first, heard = listen(students, None, "tell me", Sampling(200, 0))
        heard.get(timeout=60)
        second = listen(students, None, "tell me", Sampling(2, 0))[1]
        with pytest.raises(FullError, match="too many"):
            listen(students, None, "tell me")
        first.cancel()
        assert whole(second)
