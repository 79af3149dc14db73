"""What is done with a finished adapter: merge it into its base, describe it, publish it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from reft_ray.atomic import atomic_directory, atomic_write
from reft_ray.core.errors import ReftError, first_line
from reft_ray.hf.adapter_files import ADAPTER, ADAPTER_CONFIG, MODEL, check_adapter_config, check_replaceable
from reft_ray.hf.loading import load_base, load_tokenizer
from reft_ray.hf.lora import ADAPTER_WEIGHTS, attach_saved, merge

CARD = "README.md"
PROVENANCE = "reft_provenance.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(adapter: Path) -> dict[str, Any]:
    """An adapter's configuration. Raises ReftError unless the directory holds a plain LoRA in safetensors."""
    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ReftError(f"no adapter in {adapter}: {ADAPTER_CONFIG} is missing or unreadable") from None
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ReftError(f"no adapter in {adapter}: {ADAPTER_WEIGHTS} is missing")
    if not isinstance(config, dict):
        raise ReftError(f"{adapter / ADAPTER_CONFIG} is not a JSON object")
    check_adapter_config(config, str(adapter))
    return config


def tokenizer_folder(adapter: Path, base: str) -> str:
    """Where the tokenizer and chat template are that an adapter was trained with: its own, or those of its base."""
    return str(adapter) if (adapter / _TOKENIZER_CONFIG).is_file() else base


def merge_adapter(adapter: Path, out: Path, base: str | None = None, dtype: str = "bfloat16") -> str:
    """Write base + adapter as a model of its own with the adapter's tokenizer; returns the base's name.

    The sum is taken in float32 and rounded once. Raises ReftError for an unknown dtype, or if `out` holds other files.
    """
    config = read_config(adapter)
    if dtype not in _DTYPES:
        raise ReftError(f"--dtype {dtype}: one of {', '.join(_DTYPES)}")
    name = base or str(config.get("base_model_name_or_path") or "")
    if not name:
        raise ReftError(f"{adapter} does not name its base model: name it with --base")
    check_replaceable(out, MODEL)
    model = merge(attach_saved(load_base(name).model, "merged", adapter)).to(_DTYPES[dtype])  # type: ignore[arg-type]
    with atomic_directory(out, replace=True) as made:
        model.save_pretrained(made)
        load_tokenizer(tokenizer_folder(adapter, name)).save_pretrained(made)
    return name


def adapter_card(adapter: Path, measures: Mapping[str, Any] | None = None, licence: str | None = None) -> str:
    """The model card of an adapter as Markdown; `measures` are those of `reft-ray eval --json`."""
    config = read_config(adapter)
    base = str(config.get("base_model_name_or_path") or "unknown")
    targets = config.get("target_modules") or ()
    rank, alpha = int(config.get("r") or 1), float(config.get("lora_alpha") or 0)
    facts = {
        "base model": f"`{base}`",
        "LoRA": f"rank {rank}, scale {alpha / rank:g}",
        "adapted layers": targets if isinstance(targets, str) else ", ".join(sorted(map(str, targets))),
        "chat template": "in this directory" if (adapter / _TOKENIZER_CONFIG).is_file() else "that of the base model",
    }
    lines = [
        "---",
        f"base_model: {json.dumps(base)}",
        "library_name: peft",
        *([f"license: {json.dumps(licence)}"] if licence else []),
        "tags: [lora, reft-ray]",
        "---",
        "",
        f"# LoRA adapter for {base}",
        "",
        "Finetuned with reft_ray. Load it with `PeftModel.from_pretrained`, and prompt it through this directory's",
        "tokenizer: its chat template is the one that was trained.",
        "",
        *_table(facts),
        "",
        *_measures(measures or {}),
        *_provenance(adapter),
    ]
    return "\n".join(lines).rstrip() + "\n"


def write_card(adapter: Path, measures: Mapping[str, Any] | None = None, licence: str | None = None) -> Path:
    """Write the card into the adapter's directory; returns its path."""
    text = adapter_card(adapter, measures, licence)
    with atomic_write(adapter / CARD) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return adapter / CARD


def files_to_publish(adapter: Path) -> list[str]:
    """The names of the files of an adapter that belong to it; nothing else in its directory is published."""
    read_config(adapter)
    wanted = (*ADAPTER.required, *ADAPTER.optional, PROVENANCE)
    names = [path.name for path in sorted(adapter.iterdir()) if path.is_file() and not path.is_symlink()]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]


def push_to_hub(adapter: Path, repository: str, private: bool = True, revision: str | None = None) -> str:
    """Upload an adapter to a hub repository (`owner/name`), made if it is not there; returns its address.

    The token is the hub's own (HF_TOKEN). Raises ReftError, in one line, for whatever the hub answers.
    """
    from huggingface_hub import HfApi

    names = files_to_publish(adapter)
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=adapter,
            allow_patterns=names,
            revision=revision,
            commit_message="Upload adapter",
        )
    # Every way in which a network or a hub can fail is one line for the user.
    except Exception as error:
        raise ReftError(f"{repository} was not pushed: {first_line(error)}") from None
    return str(url)


def _table(facts: Mapping[str, object]) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in facts.items())


def _measures(report: Mapping[str, Any]) -> Iterator[str]:
    measures = report.get("measures") or {}
    if measures:
        yield from ("## Measured", "", "| measure | % | 95 % interval | n |", "|---|---|---|---|")
        for name, found in measures.items():
            low, high = found["interval"]
            yield f"| {name} | {found['value']:.1f} | {low:.1f} to {high:.1f} | {found['n']} |"
        yield ""


def _provenance(adapter: Path) -> Iterator[str]:
    if (adapter / PROVENANCE).is_file():
        yield from (f"Hashes of the training file and of the kept rows, teacher and gate: `{PROVENANCE}`.", "")
