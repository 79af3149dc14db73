"""Signed models: a directory's files and their SHA-256 in `model.sig`, checked before any of them is loaded.

The format is that of OpenSSF Model Signing (package `model-signing`), with an elliptic key in a local file: the command
`model_signing verify key` checks our directories, and `model_signing sign key` makes what we load. With REFT_VERIFY_KEY
(a public key) every base, teacher, adapter and classifier must be signed; with REFT_SIGNING_KEY (a private key)
teachers and students are signed when they are made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from reft_ray.core.errors import ReftError, UsageError, first_line

SIGNATURE = "model.sig"
SIGNING_KEY = "REFT_SIGNING_KEY"
VERIFY_KEY = "REFT_VERIFY_KEY"
_INSTALL = "signatures need the packages model-signing and pyopenssl: pip install 'reft-ray[signing]'"


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A new pair of keys (private, public) on P-256. Raises UsageError where there is one already."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private, public = folder / "signing-key.pem", folder / "verify-key.pem"
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    try:
        with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    except FileExistsError:
        raise UsageError(f"{private} exists: name another directory") from None
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def sign(folder: Path, private_key: Path, only: Sequence[str] = ()) -> Path:
    """Sign all files of a directory, or `only` these, which may then be copied without the others."""
    signing, _, hashing = _package()
    others = [path.name for path in folder.iterdir() if only and path.name not in only]
    try:
        config = signing.Config().set_hashing_config(_hashed(hashing, [SIGNATURE, *others]))
        config.use_elliptic_key_signer(private_key=private_key).sign(folder, folder / SIGNATURE)
    except (ValueError, OSError) as error:
        raise ReftError(f"{folder} cannot be signed with {private_key}: {first_line(error)}") from None
    return folder / SIGNATURE


def verify(folder: Path, public_key: Path) -> None:
    """Raise ReftError unless the directory has exactly the files that the owner of this key signed."""
    if not folder.is_dir():
        raise ReftError(f"{folder} is not a directory, and with {VERIFY_KEY} only signed directories are loaded")
    if not (folder / SIGNATURE).is_file():
        raise ReftError(f"{folder} is not signed: {SIGNATURE} is missing; sign it with `reft-ray models sign`")
    _verified(folder, public_key, _state(folder), _state(public_key))


def verify_if_asked(folder: str | Path) -> None:
    """`verify` with the key that REFT_VERIFY_KEY names; nothing where it names none."""
    if key := os.environ.get(VERIFY_KEY):
        verify(Path(folder).absolute(), Path(key))


def sign_if_asked(folder: Path, only: Sequence[str] = ()) -> None:
    """`sign` with the key that REFT_SIGNING_KEY names; nothing where it names none."""
    if key := os.environ.get(SIGNING_KEY):
        sign(folder, Path(key), only)


@lru_cache(maxsize=64)
def _verified(folder: Path, public_key: Path, *state: object) -> None:
    """Hashing 16 GB takes a while: files that did not change since are not read again by this process."""
    _, verifying, hashing = _package()
    try:
        config = verifying.Config().set_hashing_config(_hashed(hashing, [SIGNATURE]))
        config.use_elliptic_key_verifier(public_key=public_key).verify(folder, folder / SIGNATURE)
    # What a damaged signature raises is up to several parsers.
    except Exception as error:
        reason = first_line(error)[:200] if isinstance(error, ValueError) else type(error).__name__
        raise ReftError(f"{folder} is not what was signed for {public_key}: {reason}") from None


def _hashed(hashing: Any, ignored: Sequence[str]) -> Any:
    return hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _state(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    try:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        stats = [(str(file), file.lstat()) for file in files]
    except OSError as error:
        raise ReftError(f"{path} cannot be read: {error.strerror}") from None
    return tuple((name, stat.st_ino, stat.st_size, stat.st_ctime_ns) for name, stat in stats)


def _package() -> tuple[Any, Any, Any]:
    try:
        # Seconds to import, and needed with a key alone.
        from model_signing import hashing, signing, verifying
    except ImportError:
        raise UsageError(_INSTALL) from None
    return signing, verifying, hashing
