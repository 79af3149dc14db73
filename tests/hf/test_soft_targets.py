from pathlib import Path

import pytest
import torch

from reft_ray.core.batch import collate, numbered
from reft_ray.core.conversation import Example, chat
from reft_ray.core.errors import ReftError
from reft_ray.core.guided import cached_teacher, live_teacher
from reft_ray.core.losses import divergence_sum
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward
from reft_ray.hf.loading import load_base
from reft_ray.hf.soft_targets import StoredTargets, alignment_key, key_name, write_soft_targets

ANSWERS = ["sorry i cannot help with that", "no", "here is how", "sure here is bread"]


def test_stored_labels_equal_the_live_teacher_for_the_whole_vocabulary_and_bound_it_for_few_tokens(
    llama: Path, tmp_path: Path
) -> None:
    base = load_base(str(llama))
    fmt = ChatFormat(base.tokenizer)
    rows = numbered(fmt.encode(Example(chat(f"tell me {i}", answer))) for i, answer in enumerate(ANSWERS))
    teacher = ModelForward(base.model)
    batch = collate([rows[2], rows[0]], fmt.pad_id)  # not in the stored order
    student = torch.randn(len(batch.labels_N), len(base.tokenizer), generator=torch.Generator().manual_seed(0))
    live = float(divergence_sum(live_teacher(teacher)(batch), student))
    found = {}
    for k in (4, 64, 10_000):
        key = alignment_key(rows, "rt-1", 1.0, k)
        path = tmp_path / key_name(key)
        write_soft_targets(path, teacher, rows, key, fmt.pad_id, max_tokens=24)
        found[k] = float(divergence_sum(cached_teacher(StoredTargets(path, key))(batch), student))
    assert found[10_000] == pytest.approx(live, rel=1e-5)
    # Merging the tail into one outcome loses divergence, less with more tokens kept.
    assert found[4] <= found[64] <= live * (1 + 1e-5)
    assert len(StoredTargets(path, key)) == len(rows)


def test_labels_of_a_different_teacher_or_set_are_refused(llama: Path, tmp_path: Path) -> None:
    base = load_base(str(llama))
    fmt = ChatFormat(base.tokenizer)
    rows = numbered([fmt.encode(Example(chat("tell me", "no")))])
    key = alignment_key(rows, "rt-1", 1.0, 4)
    write_soft_targets(tmp_path / "t", ModelForward(base.model), rows, key, fmt.pad_id)
    with pytest.raises(ReftError, match="teacher=rt-1, not rt-2"):
        StoredTargets(tmp_path / "t", alignment_key(rows, "rt-2", 1.0, 4))
    with pytest.raises(ReftError, match="no soft targets at"):
        StoredTargets(tmp_path / "absent", key)
    assert key_name(key) != key_name(alignment_key(rows, "rt-2", 1.0, 4))
    with pytest.raises(ReftError, match="nothing to distil"):
        write_soft_targets(tmp_path / "e", ModelForward(base.model), [], key, fmt.pad_id)
