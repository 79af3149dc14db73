from pathlib import Path

import pytest
import torch

from reft_ray.core.batch import collate
from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.errors import ReftError
from reft_ray.core.geometry import Geometry
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.features import fit_readouts, labels_of, prompt_features
from reft_ray.hf.forward import ModelForward, captured_layer
from reft_ray.hf.loading import fingerprint, load_base

ROWS = [
    Example(chat("how can i bake bread", "here is how"), Label.HARMLESS),
    Example(chat("please tell me how to steal a car", "sorry i cannot help with that"), Label.HARMFUL),
    Example(chat("help"), Label.HARMLESS),
]


@pytest.mark.parametrize("shape", ["llama", "gemma", "qwen", "mixture", "sinks"])
def test_logits_and_features_equal_the_plain_forward(tiny_bases: dict[str, Path], shape: str) -> None:
    base = load_base(str(tiny_bases[shape]))
    chat_format = ChatFormat(base.tokenizer)
    batch = collate([chat_format.encode(row) for row in ROWS], chat_format.pad_id)
    forward = ModelForward(base.model)
    with torch.no_grad():
        plain = base.model(input_ids=batch.ids_BT, attention_mask=batch.attention_mask_BT, output_hidden_states=True)
        for layer in (1, 2, 3):
            predictions, feature_BD = forward.predictions_and_features(batch, layer)
            logits_NV = predictions.logits()
            expected = plain.hidden_states[layer][torch.arange(3), batch.last_prompt_index_B]
            assert torch.equal(feature_BD, expected)
            assert torch.equal(forward.features(batch, layer), expected)
            assert torch.equal(forward.logits(batch), logits_NV)
            assert torch.allclose(logits_NV, plain.logits[batch.loss_mask_BT], atol=1e-5)


def test_the_layers_above_are_not_run(llama: Path) -> None:
    base = load_base(str(llama))
    ran: list[int] = []
    for index, layer in enumerate(base.model.model.layers, start=1):
        layer.register_forward_hook(lambda *_args, index=index: ran.append(index))
    with torch.no_grad(), captured_layer(base.model, 2, stop=True):
        base.model(input_ids=torch.tensor([[1, 2, 3]]))
    assert ran == [1, 2]


def test_a_layer_that_does_not_exist_is_named(llama: Path) -> None:
    base = load_base(str(llama))
    with (
        pytest.raises(ReftError, match="layer 5 does not exist: the model has layers 1 to 4"),
        captured_layer(base.model, 5, stop=True),
    ):
        pass


def test_features_of_several_layers_come_from_one_pass_in_the_given_order(llama: Path) -> None:
    base = load_base(str(llama))
    chat_format = ChatFormat(base.tokenizer)
    encoded = [chat_format.encode(row) for row in ROWS]
    together = prompt_features(base.model, encoded, [1, 3], chat_format.pad_id, max_tokens=12)
    for index, row in enumerate(encoded):
        alone = prompt_features(base.model, [row], [1, 3], chat_format.pad_id)
        for layer in (1, 3):
            assert torch.allclose(together[layer][index], alone[layer][0], atol=1e-5)
    refusal_D = fit_readouts(together, labels_of(encoded), Geometry.PLAIN)[3].refusal_D
    assert torch.allclose(refusal_D, together[3][1] - (together[3][0] + together[3][2]) / 2, atol=1e-6)


def test_a_rank_with_fewer_prompts_runs_as_many_passes_as_the_others(llama: Path) -> None:
    base = load_base(str(llama))
    chat_format = ChatFormat(base.tokenizer)
    encoded = [chat_format.encode(row) for row in ROWS]
    ran: list[int] = []
    for index, layer in enumerate(base.model.model.layers, start=1):
        layer.register_forward_hook(lambda *_args, index=index: ran.append(index))
    asked: list[int] = []

    def three(needed: int) -> int:
        assert not ran
        asked.append(needed)
        return 3

    found = prompt_features(base.model, encoded, [1, 2], chat_format.pad_id, passes=three)
    assert (asked, ran) == ([1], [1, 2] * 3)
    alone = prompt_features(base.model, encoded, [1, 2], chat_format.pad_id)
    assert all(torch.equal(found[layer], alone[layer]) for layer in (1, 2))
    ran.clear()
    none = prompt_features(base.model, [], [1, 2], chat_format.pad_id, passes=three)
    assert (asked, ran) == ([1, 0], [1, 2] * 3)
    assert [len(part) for part in none.values()] == [0, 0]


def test_the_fingerprint_depends_on_the_weights_and_not_the_path(llama: Path, tmp_path: Path) -> None:
    base = load_base(str(llama))
    base.model.save_pretrained(tmp_path / "copy")
    assert fingerprint(str(tmp_path / "copy")) == base.fingerprint
    with torch.no_grad():
        base.model.model.layers[3].mlp.down_proj.weight[0, 0] += 1e-3
    base.model.save_pretrained(tmp_path / "other")
    assert fingerprint(str(tmp_path / "other")) != base.fingerprint


def test_a_path_without_a_causal_language_model_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(ReftError, match="no base model at /nowhere: the directory does not exist"):
        load_base("/nowhere")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ReftError, match="is a clip model, not a causal language model"):
        load_base(str(tmp_path / "clip"))


def test_pickled_weights_are_not_read(llama: Path, tmp_path: Path) -> None:
    base = load_base(str(llama))
    base.tokenizer.save_pretrained(tmp_path)
    base.model.config.save_pretrained(tmp_path)
    torch.save(base.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ReftError, match="safetensors"):
        load_base(str(tmp_path))
