"""Signed directories load, and with a key nothing else does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from reft_ray.core.errors import ReftError, UsageError
from reft_ray.hf.adapter_files import ADAPTER_CONFIG, check_adapter_config, fetch_adapter, sign_product
from reft_ray.hf.loading import load_base, load_classifier, load_tokenizer
from reft_ray.hf.lora import ADAPTER_WEIGHTS
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.hf.signatures import SIGNATURE, SIGNING_KEY, VERIFY_KEY, make_keys, sign, verify

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def base(tmp_path: Path, llama: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A signed base, where only signed models are loaded."""
    folder = tmp_path / "base"
    shutil.copytree(llama, folder)
    sign(folder, keys[0])
    monkeypatch.setenv(VERIFY_KEY, str(keys[1]))
    return folder


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / ADAPTER_CONFIG).write_text(json.dumps(CONFIG))
    save_file({"a": zeros(2)}, folder / ADAPTER_WEIGHTS)
    (folder / "README.md").write_text("a card")
    return folder


def test_a_signed_base_loads_and_the_private_key_is_private(base: Path, keys: tuple[Path, Path]) -> None:
    assert load_base(str(base)).layers == 4
    assert keys[0].stat().st_mode & 0o077 == 0
    with pytest.raises(UsageError, match="exists: name another directory"):
        make_keys(keys[0].parent)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: _flip(folder / "model.safetensors"), r"is not what was signed for .*model\.safetensors"),
        (lambda folder: _flip(folder / "tokenizer.json"), r"is not what was signed for .*tokenizer\.json"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), "Extra files found"),
        (lambda folder: (folder / "generation_config.json").unlink(), "Missing files"),
        (lambda folder: (folder / "link").symlink_to("/etc/hostname"), "symlink"),
        (lambda folder: (folder / SIGNATURE).unlink(), "is not signed"),
        (lambda folder: (folder / SIGNATURE).write_text("{}"), "is not what was signed"),
        (lambda folder: (folder / SIGNATURE).write_bytes(b"\xff"), "is not what was signed"),
        (lambda folder: sign(folder, make_keys(folder.parent / "other")[0]), "is not what was signed"),
    ],
)
def test_whatever_was_changed_after_signing_is_found(
    base: Path, change: Callable[[Path], object], message: str
) -> None:
    change(base)
    for load in (load_base, load_tokenizer):
        with pytest.raises(ReftError, match=message) as error:
            load(str(base))
        assert "\n" not in str(error.value)


def test_a_change_after_a_first_load_is_found(base: Path) -> None:
    load_tokenizer(str(base))
    _flip(base / "tokenizer.json")
    with pytest.raises(ReftError, match="is not what was signed"):
        load_tokenizer(str(base))


def test_every_loader_asks_for_a_signature(base: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "teacher.json").write_text("{}")
    for load in (load_base, load_tokenizer, load_classifier, RefTeacher.load):
        with pytest.raises(ReftError, match=r"is not signed: model\.sig is missing"):
            load(str(tmp_path / "plain"))
    with pytest.raises(ReftError, match="only signed directories are loaded"):
        load_base("example/on-a-hub")


def test_adapters_are_signed_when_made_and_verified_when_fetched(
    base: Path, tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter(tmp_path / "made")
    with pytest.raises(ReftError, match="is not signed"):
        fetch_adapter(str(made), tmp_path / "a", 1 << 20)
    sign_product(made)
    assert not (made / SIGNATURE).exists()
    monkeypatch.setenv(SIGNING_KEY, str(keys[0]))
    sign_product(made)
    (made / "README.md").write_text("another card")
    verify(fetch_adapter(made.as_uri(), tmp_path / "b", 1 << 20), keys[1])
    (made / ADAPTER_CONFIG).write_text(json.dumps({**CONFIG, "r": 3}))
    with pytest.raises(ReftError, match=r"is not what was signed for .*adapter_config"):
        fetch_adapter(str(made), tmp_path / "c", 1 << 20)


def test_without_a_key_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VERIFY_KEY, raising=False)
    assert fetch_adapter(str(adapter(tmp_path / "made")), tmp_path / "a", 1 << 20) == tmp_path / "a"


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ".*(a+)+$"},
        {"target_modules": ["q_proj", "(a|a)*"]},
        {"target_modules": {"q_proj": 1}},
        {"exclude_modules": "(x+x+)+y"},
        {"rank_pattern": {"(a+)+": 4}},
        {"rank_pattern": {"q_proj": 10**9}},
        {"alpha_pattern": {"q_proj": "8"}},
        {"layers_pattern": "(l+)+"},
        {"r": 10**9},
        {"r": "8"},
        {"lora_alpha": float("inf")},
        {"arrow_config": {"top_k": 1}},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"loftq_config": {"bits": 4}},
        {"a_key_of_a_later_release": [1]},
    ],
)
def test_an_adapter_that_is_more_than_a_plain_lora_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ReftError, match=f"uses {next(iter(change))}, which a shared base does not allow"):
        check_adapter_config({**CONFIG, **change}, "there")


def test_what_peft_writes_for_a_plain_lora_is_accepted() -> None:
    from peft import LoraConfig

    plain = LoraConfig(r=8, target_modules=["q_proj"], rank_pattern={"layers.3.q_proj": 4}, layers_to_transform=[0, 1])
    written = {key: sorted(value) if isinstance(value, set) else value for key, value in plain.to_dict().items()}
    check_adapter_config({**written, "peft_type": "LORA"}, "there")
