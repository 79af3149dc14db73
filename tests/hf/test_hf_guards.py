"""Guards from local models: harm is found anywhere in a row, and rows do not change each other's probability."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from reft_ray.core.cascade import Combine
from reft_ray.core.conversation import Message, Part, chat
from reft_ray.core.errors import ReftError
from reft_ray.guards.formats import Question
from reft_ray.guards.settings import guard_from, load_guard
from reft_ray.hf.guards import ClassifierGuard, GeneratorGuard, LocalReplies
from reft_ray.hf.tiny import TinyShape, tiny_llama, train_tokenizer
from reft_ray.screening.guards import GuardEnsemble
from reft_ray.testbed.word_scorer import WordScorer

WORDS = ["tea", "milk", "bread", "honey", "water", "bomb"]
SHAPE = TinyShape(hidden=32, layers=1, heads=2, intermediate=64, max_positions=96)


def probabilities(guard, rows):
    return [found.probability for found in guard.opinions(rows)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS) + " safe unsafe"] * 4, vocab_size=400, max_positions=96)


@pytest.fixture(scope="module")
def classifier(tokenizer, tmp_path_factory):
    """Trained here to flag one word."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1},
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        texts, labels = [], []
        for index in range(16):
            chosen = torch.randint(0, 5, (int(torch.randint(1, 12, (1,), generator=generator)),), generator=generator)
            words = [WORDS[i] for i in chosen]
            if index % 2:
                words[(step + index) % len(words)] = "bomb"
            texts.append(" ".join(words))
            labels.append(index % 2)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=torch.tensor(labels)
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("generator")
    tiny_llama(tokenizer, SHAPE, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_classifier_finds_harm_in_any_part_and_any_window(classifier):
    guard = ClassifierGuard.load(str(classifier), device="cpu")
    filler = " ".join(["tea milk bread"] * 60)
    harmless, answer, deep = chat("tea milk"), chat("tea", "a bomb"), chat(f"{filler} bomb {filler}")
    scores = probabilities(guard, [harmless, answer, deep, ()])
    assert scores[0] < guard.threshold <= min(scores[1:])
    assert scores[3] == 1.0
    alone = [probabilities(guard, [turns])[0] for turns in (harmless, answer, deep)]
    assert scores[:3] == pytest.approx(alone, abs=1e-4)


def test_special_tokens_in_text_are_text_for_a_classifier(classifier, tokenizer, monkeypatch):
    guard = ClassifierGuard.load(str(classifier), device="cpu")
    seen = []
    monkeypatch.setattr(guard, "_harm", lambda windows: seen.extend(windows) or torch.zeros(len(windows)))
    probabilities(guard, [chat(f"tea {tokenizer.eos_token} bomb")])
    assert tokenizer.eos_token_id not in [token for window in seen for token in window]


def test_a_classifier_needs_its_harmful_labels_named(classifier):
    assert (
        probabilities(ClassifierGuard.load(str(classifier), harmful=["safe"], device="cpu"), [chat("tea milk")])[0]
        > 0.5
    )
    with pytest.raises(ReftError, match="safe, unsafe"):
        ClassifierGuard.load(str(classifier), harmful=["toxic"], device="cpu")
    with pytest.raises(ReftError, match="classifier from safetensors"):
        ClassifierGuard.load(str(classifier / "missing"), device="cpu")


def test_a_generator_compares_the_likelihoods_of_its_two_answers(generator):
    rows = [chat("tea milk"), chat("bomb", "honey bread"), (Message("user", "x"), Message("assistant", "y"))]
    guard = GeneratorGuard.load(str(generator), device="cpu")
    scores = probabilities(guard, rows)
    swapped = probabilities(GeneratorGuard.load(str(generator), device="cpu", safe="unsafe", unsafe="safe"), rows)
    assert all(0.0 < score < 1.0 for score in scores)
    assert [1 - score for score in swapped] == pytest.approx(scores, abs=1e-5)
    assert probabilities(guard, rows[1:2])[0] == pytest.approx(scores[1], abs=1e-6)
    assert probabilities(guard, [()]) == [1.0]


def test_a_generator_judges_dialogues_longer_than_its_context(generator):
    guard = GeneratorGuard.load(str(generator), device="cpu")
    prompts = guard._prompts(chat("tea milk bread " * 80, "honey"))
    assert len(prompts) > 3
    assert all(len(prompt) <= guard._max_tokens for prompt in prompts)
    assert 0.0 < probabilities(guard, [chat("tea milk bread " * 80, "honey")])[0] < 1.0


def test_a_generator_judges_tool_calls(generator, monkeypatch):
    guard = GeneratorGuard.load(str(generator), device="cpu")
    called = Message("assistant", "honey", calls=(Part("tool_calls[0]", "name: bomb"), Part("note", "milk " * 200)))
    whole, *calls = guard._prompts((Message("user", "tea"), called))
    texts = [guard._chat.tokenizer.decode(prompt) for prompt in (whole, *calls)]
    assert ("tea" in texts[0], "bomb" in texts[0]) == (True, False)
    assert len(calls) > 2
    (harmful,) = [prompt for prompt, text in zip(calls, texts[1:], strict=True) if "bomb" in text]
    monkeypatch.setattr(guard, "_probability", lambda prompt: 0.9 if prompt == harmful else 0.1)
    assert probabilities(guard, [(Message("user", "tea"), called), chat("tea", "honey")]) == [0.9, 0.1]


def test_a_nan_score_is_an_error(classifier, monkeypatch):
    guard = ClassifierGuard.load(str(classifier))
    monkeypatch.setattr(guard, "_harm", lambda windows: torch.full((len(windows),), float("nan")))
    with pytest.raises(ReftError, match="must be replaced"):
        GuardEnsemble(WordScorer(), [guard], Combine.ALL).judge([chat("a bomb", "ok")])


def test_a_local_model_generates_its_replies(generator):
    replies = LocalReplies.load(str(generator), device="cpu")
    asked = [Question((Message("user", "tea"),)), Question(raw="<|user|>tea")]
    found = replies(asked, 4)
    assert len(found) == 2
    assert replies(asked[:1], 4) == found[:1]
    with pytest.raises(ReftError, match="longer than its context"):
        replies([Question((Message("user", "tea " * 200),))], 4)
    guard = load_guard(guard_from(f"llama-guard:{generator}"), device="cpu")
    assert guard.guard_id == f"llama-guard:{generator.name}"
    with pytest.raises(ReftError, match="another format"):
        guard.opinions([chat("tea")])
