"""The one tree of exceptions.

    CheckpointEngineError
    ├── UsageError (ValueError)         the caller asked for something that cannot be
    ├── SourceError (ValueError)        a checkpoint file or state dict is not what it claims
    ├── ManifestError (ValueError)      a manifest contradicts itself or asks for absurd sizes
    ├── StoreError                      host memory: budget, unknown or duplicate version
    ├── HandoverError                   a socket, folder or descriptor here cannot be trusted
    ├── ProtocolError                   a peer sent what the protocol does not allow
    │   └── ForeignPeer                 a peer is not of this package: MoonshotAI's, say
    ├── PeerLost                        a peer closed its connection or died
    ├── DeadlineExceeded (TimeoutError) a wait reached its deadline
    ├── TransferError                   bytes did not arrive, or not as they were sent
    ├── AdapterError                    the engine cannot take these weights, or failed to
    │   └── VerificationError           what is served is not what was sent
    ├── UpdateRefused                   the transaction was refused before any weight changed
    └── UpdateFailed                    the transaction ended without publishing; carries the report

Every message says what was wrong, where, and what to do about it. Failures travel between
processes as `RemoteError`: plain text, never an exception object.
"""

from __future__ import annotations

import traceback
from typing import Any

import msgspec

__all__ = [
    "AdapterError",
    "CheckpointEngineError",
    "DeadlineExceeded",
    "ForeignPeer",
    "HandoverError",
    "ManifestError",
    "PeerLost",
    "ProtocolError",
    "RemoteError",
    "SourceError",
    "StoreError",
    "TransferError",
    "UpdateFailed",
    "UpdateRefused",
    "UsageError",
    "VerificationError",
]


# What msgspec and json raise for bytes that somebody else chose.
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class CheckpointEngineError(Exception):
    """Base of everything that this package raises on purpose."""


class UsageError(CheckpointEngineError, ValueError):
    """The caller asked for something that cannot be done as asked."""


class SourceError(CheckpointEngineError, ValueError):
    """A checkpoint file or state dict is truncated, garbled or not what it claims to be."""


class ManifestError(CheckpointEngineError, ValueError):
    """A manifest contradicts itself, or asks for more than any model needs."""


class StoreError(CheckpointEngineError):
    """The store cannot hold, find or release a version."""


class HandoverError(CheckpointEngineError):
    """A socket, folder, peer or descriptor on this host cannot be trusted or used."""


class ProtocolError(CheckpointEngineError):
    """A peer sent a message that the protocol does not allow at this point."""


class ForeignPeer(ProtocolError):
    """A peer speaks another package's protocol, and will never speak this one."""


class PeerLost(CheckpointEngineError):
    """A peer closed its connection, or its process died."""


class DeadlineExceeded(CheckpointEngineError, TimeoutError):
    """A wait reached its deadline."""


class TransferError(CheckpointEngineError):
    """Bytes did not arrive, or did not arrive as they were sent."""


class AdapterError(CheckpointEngineError):
    """The inference engine cannot take these weights, or failed while taking them."""


class VerificationError(AdapterError):
    """What is staged or served is not, byte for byte, what was sent."""


class UpdateRefused(CheckpointEngineError):
    """The transaction was refused before any weight changed."""


class UpdateFailed(CheckpointEngineError):
    """The transaction ended without publishing; `report` is its `update.protocol.Report`."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class RemoteError(msgspec.Struct, frozen=True, kw_only=True):
    """A failure as plain data, so that the first cause can be shown where the user is.

    `where` names the place in the user's terms ("rank 1, bucket 7", "replica 4711").
    """

    type: str
    message: str
    where: str = ""
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, where: str = "") -> RemoteError:
        """Describe `error` with its traceback."""
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        return cls(type=type(error).__name__, message=str(error), where=where, traceback=trace)

    def __str__(self) -> str:
        """One line: where, what kind, what it said."""
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.type}: {self.message}"
