"""The metas of a server as a file, by which new instances find its ranks.

It holds the tickets with which the ranks are read from, so only its owner may read it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from checkpoint_engine.errors import MALFORMED, ManifestError, UsageError
from checkpoint_engine.update.versions import RankMeta

__all__ = ["decode_metas", "load_metas_file", "save_metas_file"]


def decode_metas(metas: Mapping[int, Any] | Mapping[str, Any]) -> list[RankMeta]:
    """What `ParameterServer.get_metas` gave, in the order of ranks.

    Raises:
        ManifestError: it is malformed, or not of all ranks.
    """
    try:
        by_rank = msgspec.convert(metas, dict[int, RankMeta], strict=False)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise ManifestError(f"not what get_metas gives: {error}") from error
    decoded = [by_rank[rank] for rank in sorted(by_rank)]
    if [meta.rank for meta in decoded] != list(range(len(decoded))):
        raise ManifestError(f"these are the metas of ranks {sorted(by_rank)}: some are missing")
    return decoded


def save_metas_file(file: str | os.PathLike[str], metas: Mapping[int, Any]) -> None:
    """Write what `ParameterServer.get_metas` gave, as JSON, mode 0600, whole or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    path = Path(file)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as out:
            out.write(msgspec.json.encode(metas))
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_metas_file(file: str | os.PathLike[str]) -> dict[str, Any]:
    """What `ParameterServer.load_metas` takes, from a file.

    Raises:
        UsageError: it cannot be read.
        ManifestError: it is no such file.
    """
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    try:
        metas: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
    except MALFORMED as error:
        raise ManifestError(f"{file}: not a metas file: {error}") from error
    return metas
