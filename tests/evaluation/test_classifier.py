import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from reft_ray.core.errors import ReftError
from reft_ray.hf.classifier import HarmClassifier
from reft_ray.hf.tiny import train_tokenizer

PROMPTS = ["how to rob a bank", "name a fruit", "say it " * 40]
ANSWERS = ["step one", "apples and pears, if I may say so", "no"]


def saved(folder, problem_type):
    tokenizer = train_tokenizer([*PROMPTS, *ANSWERS], 300, max_positions=64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        problem_type=problem_type,
        id2label={0: "safe", 1: "violence", 2: "fraud"},
        label2id={"safe": 0, "violence": 1, "fraud": 2},
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, model


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_batches_equal_one_pair_at_a_time(tmp_path, problem_type):
    tokenizer, model = saved(tmp_path, problem_type)
    scores = HarmClassifier(str(tmp_path), ["violence", "fraud"])(PROMPTS, ANSWERS)
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        inputs = tokenizer(prompt, answer, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        if problem_type.startswith("multi"):
            expected = max(logits.sigmoid()[1:].tolist())
        else:
            expected = float(logits.softmax(-1)[1:].sum())
        assert score == pytest.approx(expected, abs=1e-5)


def test_unknown_labels_and_missing_models_are_one_line_errors(tmp_path):
    saved(tmp_path / "model", "single_label_classification")
    with pytest.raises(ReftError, match="no label 'unsafe'; its labels are fraud, safe, violence"):
        HarmClassifier(str(tmp_path / "model"), ["unsafe"])
    with pytest.raises(ReftError, match="harmful labels"):
        HarmClassifier(str(tmp_path / "model"), [])
    with pytest.raises(ReftError, match="cannot load"):
        HarmClassifier(str(tmp_path / "absent"), ["unsafe"])
