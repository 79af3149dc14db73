"""What a run may replace: an older product of the same kind, in a directory that holds nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from reft_ray.core.errors import ReftError
from reft_ray.hf.adapter_files import ADAPTER_CONFIG
from reft_ray.hf.lora import ADAPTER_WEIGHTS


@dataclass(frozen=True, slots=True)
class OutputKind:
    """A kind of directory: patterns of the files that make one, and of the others that a run writes into it."""

    name: str
    marks: tuple[str, ...]
    others: tuple[str, ...] = ()

    def below(self, folder: str) -> tuple[str, ...]:
        """All patterns, for a product inside another one."""
        return tuple(f"{folder}/{pattern}" for pattern in (*self.marks, *self.others))


ADAPTER = OutputKind("adapter", (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
MODEL = OutputKind(
    "model",
    ("config.json", "*.safetensors"),
    (
        "generation_config.json",
        "model.safetensors.index.json",
        # Of the tokenizer, whose files differ from one kind to the next.
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.*",
        "vocab.*",
        "merges.txt",
        "*.model",
    ),
)


def check_replaceable(folder: Path, product: OutputKind) -> None:
    """Raise ReftError unless `folder` is absent, empty, or an older product of this kind and nothing beside it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ReftError(f"{folder} is no directory: choose another name")
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    if files and not all(any(_fits(file, mark) for file in files) for mark in product.marks):
        raise ReftError(f"{folder} exists and holds no {product.name}: choose another directory")
    for file in files:
        if not any(_fits(file, pattern) for pattern in (*product.marks, *product.others)):
            raise ReftError(f"{folder} holds {file} beside its {product.name}: move it, or choose another directory")


def _fits(file: PurePath, pattern: str) -> bool:
    wanted = PurePath(pattern)
    return file.parent == wanted.parent and fnmatchcase(file.name, wanted.name)
