import json

import pytest
import torch

from reft_ray.evaluation.judges import Grade, RefusalMatcher
from reft_ray.evaluation.task_accuracy import is_right
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.generate import Responder
from reft_ray.hf.loading import load_base
from reft_ray.hf.tiny import TinyShape
from reft_ray.testbed.base_model import Recipe, ensure_base
from reft_ray.testbed.synthetic import SyntheticRows
from reft_ray.testbed.tasks import Task

TINY = Recipe(rows=96, vocab_size=320, shape=TinyShape(hidden=16, layers=2, heads=2, intermediate=16))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_the_cache_is_keyed_by_recipe_and_seed(tmp_path):
    steps = []
    first = ensure_base(tmp_path, 0, lambda done, total: steps.append((done, total)), TINY)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert ensure_base(tmp_path, 0, lambda *_: pytest.fail("trained again"), TINY) == first
    assert ensure_base(tmp_path, 1, recipe=TINY) != first
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


def test_the_seed_determines_the_base(tmp_path):
    random_state = torch.random.get_rng_state()
    one, two = (ensure_base(tmp_path / name, 0, recipe=TINY) for name in ("one", "two"))
    assert one.name == two.name
    assert weights(one) == weights(two)
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_a_failed_training_leaves_no_files(tmp_path):
    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_base(tmp_path, 0, fail, TINY)
    assert list(tmp_path.iterdir()) == []


def test_the_base_loads_like_any_model_and_its_template_marks_the_answer(tmp_path):
    base = load_base(str(ensure_base(tmp_path, 0, recipe=TINY)))
    chat_format = ChatFormat(base.tokenizer)
    row = SyntheticRows.make(0).alignment[0]
    encoded = chat_format.encode(row)
    answer = [token for token, trained in zip(encoded.ids, encoded.loss_mask, strict=True) if trained]
    assert base.tokenizer.decode(answer) == row.response + base.tokenizer.eos_token
    assert base.tokenizer.decode([encoded.ids[encoded.last_prompt_index]]) == "<|assistant|>"
    assert not chat_format.fallback
    odd = "naïve 漢字 \U0001f600"
    assert base.tokenizer.decode(base.tokenizer(odd)["input_ids"]) == odd
    assert json.loads((tmp_path / base.name / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_base_complies_with_everything_and_is_weak_at_the_tasks(tmp_path):
    base = load_base(str(ensure_base(tmp_path)))
    assert 1e6 < sum(parameter.numel() for parameter in base.model.parameters()) < 3e6
    respond = Responder(base.model, ChatFormat(base.tokenizer), max_new_tokens=48)
    synthetic = SyntheticRows.make(0)
    for prompts in (synthetic.hs_prompts, synthetic.over_refusal_prompts):
        conversations = [row.prompt for row in prompts]
        judged = RefusalMatcher().judge(conversations, respond(conversations))
        assert judged.count(Grade.COMPLIED) >= 0.99 * len(judged)
    for task, match in ((Task.SENTIMENT, "label"), (Task.ARITHMETIC, "number")):
        rows = synthetic.task_test(task)
        answers = respond([row.prompt for row in rows])
        right = sum(is_right(match, answer, row.response) for answer, row in zip(answers, rows, strict=True))
        assert right < 0.6 * len(rows)
