"""Packed rows, losses in parts, and narrow products: the gradients are those of plain training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

from reft_ray.core import losses
from reft_ray.core.batch import TokenizedExample, collate, micro_batches, pack, packed_lines
from reft_ray.core.errors import UsageError
from reft_ray.core.guided import Distillation, guided_step, live_teacher
from reft_ray.core.losses import cross_entropy_sum
from reft_ray.hf.forward import ModelForward, decoder_layers, hidden_of, recompute_above
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import LoraSettings, attach
from reft_ray.hf.packing import ATTENTION, enable_packing
from reft_ray.hf.training import Speed, make_ready, optimizer_of

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "qwen3": Qwen3Config(**COMMON, head_dim=8),
    "mistral, window": MistralConfig(**COMMON, head_dim=8, sliding_window=4),
    "gemma 3, window": Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "gemma 2, soft caps": Gemma2Config(**COMMON, head_dim=8, sliding_window=4),
    "granite, scaled logits": GraniteConfig(**COMMON, logits_scaling=4.0),
    "cohere, scaled logits": CohereConfig(**COMMON, logit_scale=0.25),
}
PACKED = [name for name in CONFIGS if name != "gemma 2, soft caps"]


def model_of(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(CONFIGS[name]).train()


def rows(lengths: Sequence[int] = (9, 5, 12, 3)) -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(1)
    return [
        TokenizedExample(
            torch.randint(1, 64, (n,), generator=generator).tolist(), [False, *[True] * (n - 1)], 0, index=i
        )
        for i, n in enumerate(lengths)
    ]


def gradients(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    run()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_have_the_gradient_of_padded_ones(name: str) -> None:
    model = model_of(name)
    forward = ModelForward(model)
    teacher = Distillation(live_teacher(ModelForward(model_of("llama"))), 0.5, 2.0)

    def step(packed: bool) -> None:
        user, aligned = (micro_batches(part, 16, 0, "cpu", packed) for part in (rows(), rows((4, 7))))
        guided_step(forward, user, aligned, teacher)

    padded = gradients(model, lambda: step(False))
    assert enable_packing(model)
    assert_close(gradients(model, lambda: step(True)), padded)
    # Padded batches, such as those of generation, still work.
    assert_close(gradients(model, lambda: step(False)), padded)


def test_features_of_packed_rows_are_those_of_padded_ones() -> None:
    model = model_of("llama").eval()
    assert enable_packing(model)
    forward, some = ModelForward(model), rows()
    with torch.no_grad():
        for layer in (1, 2):
            torch.testing.assert_close(forward.features(pack(some), layer), forward.features(collate(some, 0), layer))


def test_a_model_that_cannot_read_packed_rows_is_left_as_it_was() -> None:
    model = model_of("gemma 2, soft caps")
    before = model.config._attn_implementation
    assert not enable_packing(model)
    assert model.config._attn_implementation == before != ATTENTION


def test_lines_hold_every_row_once_within_the_budget() -> None:
    lengths = [5, 9, 3, 3, 7, 20, 1]
    lines = packed_lines(lengths, 10)
    assert sorted(index for line in lines for index in line) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in line) <= 10 for line in lines if line != [5])
    assert len(lines) == 4  # 20 | 9 + 1 | 7 + 3 | 5 + 3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loss_in_parts_has_the_gradient_of_whole_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every weight, the head's own too, also where it is the embedding."""
    model, batch = model_of(name), collate(rows(), 0)
    forward = ModelForward(model)

    def plain() -> None:
        logits = model(input_ids=batch.ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits
        cross_entropy_sum(logits[batch.loss_mask_BT], batch.labels_N).backward()

    expected = gradients(model, plain)
    monkeypatch.setattr(losses, "_PART_LOGITS", {"cpu": 3 * 64})
    predictions = forward.predictions(batch)
    assert predictions.hidden_ND.shape == (batch.labelled, 32)
    assert_close(
        gradients(model, lambda: cross_entropy_sum(forward.predictions(batch), batch.labels_N).backward()), expected
    )


def test_recomputed_activations_change_no_gradient() -> None:
    model, batches = model_of("llama"), [collate(rows(), 0)]
    forward = ModelForward(model)
    plain = gradients(model, lambda: guided_step(forward, batches))
    recompute_above(model, 0)
    again = gradients(model, lambda: guided_step(forward, batches))
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())


def kept_bytes(run: Callable[[], object], parameters: Sequence[nn.Parameter]) -> int:
    """Bytes of the tensors that autograd keeps, parameters aside."""
    known, kept = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(size for _, size in kept.values())


def test_narrow_products_keep_less_and_train_wide_adapters() -> None:
    batch = collate(rows((40, 40)), 0)
    found: dict[bool, tuple[int, Tensor]] = {}
    for autocast in (False, True):
        model = attach(model_of("llama").to(torch.bfloat16), "student", LoraSettings(rank=4), seed=1)
        if autocast:
            make_ready(model, speed=Speed(packed=False))
        forward = ModelForward(model)
        kept = kept_bytes(lambda forward=forward: forward.predictions(batch), list(model.parameters()))
        grads = gradients(model, lambda forward=forward: guided_step(forward, [batch]))
        assert all(gradient.dtype == torch.float32 for gradient in grads.values())
        found[autocast] = kept, torch.cat([gradient.flatten() for gradient in grads.values()])
    assert found[True][0] < 0.8 * found[False][0]
    assert torch.cosine_similarity(found[True][1], found[False][1], dim=0) > 0.99


def test_what_needs_a_gpu_says_so(llama: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match="quantize=4bit needs a CUDA GPU, and there is none"):
        load_base(str(llama), four_bit=True)
    model = model_of("llama")
    with pytest.raises(UsageError, match="kernels=liger needs a CUDA GPU, and there is none"):
        make_ready(model, speed=Speed(liger=True))
    with pytest.raises(UsageError, match=r"optimizer.states=8bit needs a CUDA GPU"):
        optimizer_of(model.parameters(), 1e-3, 0.0, "8bit")


@pytest.mark.parametrize("tokens", [0, 1_000_000])
def test_no_backward_pass_below_the_lowest_adapter(tokens: int) -> None:
    """Layers without adapters under the first one with any are only run forwards, with and without recomputation."""
    model = attach(model_of("llama"), "student", LoraSettings(rank=2, first_layer=2))
    recompute_above(model, tokens)
    forward = ModelForward(model)
    hidden: list[Tensor] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda _module, _args, output: hidden.append(hidden_of(output)))
    batch = collate(rows(), 0)
    cross_entropy_sum(forward.predictions(batch), batch.labels_N).backward()
    assert [states.requires_grad for states in hidden[:2]] == [False, True]
    assert any(p.grad is not None for p in model.parameters())


def test_attention_of_narrow_training_on_a_cpu_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    types: list[torch.dtype] = []
    attend = nn.functional.scaled_dot_product_attention

    def seen(query: Tensor, *args: Tensor, **options: bool) -> Tensor:
        types.append(query.dtype)
        return attend(query, *args, **options)

    # Other tests set the attention of the shared configuration.
    bare = AutoModelForCausalLM.from_config(deepcopy(CONFIGS["llama"]), attn_implementation="sdpa").train()
    model = attach(bare.to(torch.bfloat16), "student", LoraSettings(rank=2))
    make_ready(model, speed=Speed(packed=False))
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", seen)
    batch = collate(rows(), 0)
    predictions = ModelForward(model).predictions(batch)
    cross_entropy_sum(predictions, batch.labels_N).backward()
    assert set(types) == {torch.float32}
    assert predictions.hidden_ND.dtype is torch.bfloat16


@pytest.mark.parametrize("name", PACKED)
def test_rows_after_a_shared_prefix_have_the_gradient_of_padded_ones(name: str) -> None:
    """The prefix is longer than the sliding window of the models that have one."""
    model = model_of(name)
    same = [7, 9, 3, 5, 11, 2]
    some = [TokenizedExample([*same, *row.ids], [False] * 7 + row.loss_mask[1:], 6, index=row.index) for row in rows()]
    forward = ModelForward(model)

    def step(packed: bool) -> None:
        guided_step(forward, micro_batches(some, 32, 0, "cpu", packed))

    padded = gradients(model, lambda: step(False))
    assert enable_packing(model)
    lines = micro_batches(some, 32, 0, "cpu", True)
    assert sum(line.ids_BT.numel() for line in lines) == sum(map(len, rows())) + len(lines) * len(same)
    assert_close(gradients(model, lambda: step(True)), padded)


def test_a_shared_prefix_ends_before_the_first_label() -> None:
    """Rows with one prompt and one beginning of their answers: what predicts a label is a row's own."""
    some = [TokenizedExample([1, 2, 3, 4, end], [False, False, False, True, True], 2, index=end) for end in (5, 6)]
    (line,) = micro_batches(some, 32, 0, "cpu", True)
    assert line.ids_BT.tolist() == [[1, 2, 3, 4, 5, 3, 4, 6]]
    assert line.labels_N.tolist() == [4, 5, 4, 6]
    assert line.packing.position_1T.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
