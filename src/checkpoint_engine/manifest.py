"""What one version of a model is: its tensors, their digests, and where each byte lies.

A manifest describes a flat byte space in which every tensor starts at a multiple of 256 bytes.
It is pure data, JSON in and out, and it is validated before anything is allocated for it, since
it may come from a peer that lies.

Identity depends on content alone:

- a tensor is cut into chunks of 4 MiB, and each chunk has its xxh3-128 digest;
- the tensor's digest is xxh3-128 over its chunk digests;
- the version's digest is sha256 over (name, dtype, shape, tensor digest), sorted by name.

So the same weights have the same name everywhere, whatever the bucket size, the number of ranks
or files, and whether tied tensors were stored once or twice.

    manifest = Manifest.of(tensors)                # TensorMeta with offsets and chunk digests
    data = manifest.to_json()
    assert decode_manifest(data).digest == manifest.digest
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator

import msgspec
import xxhash

from checkpoint_engine.dtypes import num_bytes
from checkpoint_engine.errors import MALFORMED, ManifestError, UsageError

__all__ = [
    "ALIGNMENT_BYTES",
    "CHUNK_BYTES",
    "DIGEST_BYTES",
    "Chunk",
    "Manifest",
    "TensorMeta",
    "Version",
    "align",
    "check_manifest",
    "check_tensor",
    "cut_chunks",
    "decode_manifest",
    "num_chunks",
    "version_digest",
]

ALIGNMENT_BYTES = 256
CHUNK_BYTES = 4 << 20
DIGEST_BYTES = 16
MAX_NAME_BYTES = 1024
MAX_NUM_TENSORS = 4_000_000
MAX_NUM_DIMS = 64
MAX_DIM = 1 << 48
MAX_VERSION_BYTES = 1 << 46  # 64 TiB: ten times the largest model that anyone serves


def align(offset: int) -> int:
    """The next multiple of 256 bytes."""
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def num_chunks(length: int) -> int:
    """How many digest chunks cover `length` bytes; none cover an empty tensor."""
    return -(-length // CHUNK_BYTES)


class TensorMeta(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of a version.

    Tied tensors are several entries, each under its own name, over the same bytes.

    Attributes:
        name: the parameter's name in the checkpoint.
        dtype: a safetensors dtype name, such as "BF16".
        shape: the safetensors shape; () for a scalar.
        offset: first byte in the flat byte space, a multiple of 256.
        length: bytes, contiguous and row-major; 0 for an empty tensor.
        chunk_digests: 16 bytes of xxh3-128 for each 4 MiB chunk; empty until digested.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    chunk_digests: bytes = b""

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.length

    @property
    def digest(self) -> bytes:
        """xxh3-128 over the chunk digests, 16 bytes."""
        return xxhash.xxh3_128_digest(self.chunk_digests)


class Chunk(msgspec.Struct, frozen=True):
    """Up to 4 MiB of one tensor in the flat byte space, and the digest promised for it."""

    offset: int
    length: int
    digest: bytes
    tensor: str

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.length


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """What a version is called (`label`), what it is (`digest`), and what it was made from."""

    label: str
    digest: str
    parent: str | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The tensors of one version in the order of their offsets.

    Attributes:
        tensors: sorted by (offset, name).
        num_bytes: size of the flat byte space, a multiple of 256.
        digest: the version's digest, 64 hex digits.
    """

    tensors: tuple[TensorMeta, ...]
    num_bytes: int
    digest: str

    @classmethod
    def of(cls, tensors: Iterable[TensorMeta]) -> Manifest:
        """Describe digested tensors.

        Raises:
            ManifestError: they overlap, repeat a name, or lack a digest.
        """
        ordered = tuple(sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name)))
        manifest = cls(
            tensors=ordered,
            num_bytes=align(max((tensor.end for tensor in ordered), default=0)),
            digest="",
        )
        _validate(manifest)
        return msgspec.structs.replace(manifest, digest=version_digest(ordered))

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk once, in the order of offsets; tied tensors share theirs."""
        return cut_chunks(self.tensors)

    def to_json(self) -> bytes:
        """The manifest as JSON; digests are base64."""
        return msgspec.json.encode(self)

    def to_msgpack(self) -> bytes:
        """The manifest as msgpack, for the wire."""
        return msgspec.msgpack.encode(self)


def cut_chunks(tensors: Iterable[TensorMeta]) -> Iterator[Chunk]:
    """The chunks of tensors that are sorted by offset, digested or not."""
    end = 0
    for tensor in tensors:
        if tensor.length == 0 or tensor.offset < end:
            continue
        end = tensor.end
        for number, start in enumerate(range(0, tensor.length, CHUNK_BYTES)):
            place = number * DIGEST_BYTES
            yield Chunk(
                tensor.offset + start,
                min(CHUNK_BYTES, tensor.length - start),
                tensor.chunk_digests[place : place + DIGEST_BYTES],
                tensor.name,
            )


def decode_manifest(data: bytes | bytearray | memoryview, *, msgpack: bool = False) -> Manifest:
    """Decode and validate a manifest that may come from anywhere. Nothing is allocated for it.

    Raises:
        ManifestError: it is malformed, or contradicts itself.
    """
    decode = msgspec.msgpack.decode if msgpack else msgspec.json.decode
    try:
        manifest = decode(data, type=Manifest)
    except MALFORMED as error:
        raise ManifestError(f"not a manifest: {error}") from error
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise ManifestError if a manifest that was made elsewhere contradicts itself."""
    _validate(manifest)
    if manifest.digest != version_digest(manifest.tensors):
        raise ManifestError("the manifest's digest is not that of its tensors")


def version_digest(tensors: Iterable[TensorMeta]) -> str:
    """The version's digest over its tensors, which depends on content alone: 64 hex digits."""
    digest = hashlib.sha256(b"ckpt-engine version 1\n")
    for tensor in sorted(tensors, key=lambda tensor: tensor.name.encode()):
        name, dtype = tensor.name.encode(), tensor.dtype.encode()
        digest.update(struct.pack("<I", len(name)) + name)
        digest.update(struct.pack("<I", len(dtype)) + dtype)
        digest.update(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
        digest.update(tensor.digest)
    return digest.hexdigest()


def _validate(manifest: Manifest) -> None:
    tensors = manifest.tensors
    if len(tensors) > MAX_NUM_TENSORS:
        raise ManifestError(f"{len(tensors)} tensors are more than the {MAX_NUM_TENSORS} allowed")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ManifestError("a name occurs twice")
    end_bytes = 0
    previous: TensorMeta | None = None
    for tensor in tensors:
        check_tensor(tensor)
        if len(tensor.chunk_digests) != DIGEST_BYTES * num_chunks(tensor.length):
            raise ManifestError(f"{tensor.name!r}: wrong number of chunk digests")
        if previous is not None and (tensor.offset, tensor.name) < (previous.offset, previous.name):
            raise ManifestError(f"{tensor.name!r}: tensors are not sorted by offset and name")
        if tensor.length and tensor.offset < end_bytes and not _same_bytes(tensor, previous):
            raise ManifestError(f"{tensor.name!r} overlaps the tensor before it")
        end_bytes = max(end_bytes, tensor.end)
        previous = tensor if tensor.length else previous
    if manifest.num_bytes != align(end_bytes):
        raise ManifestError(
            f"the byte space has {manifest.num_bytes} bytes but its tensors end at {end_bytes}"
        )
    stored_bytes = sum(align(length) for _, length in {(t.offset, t.length) for t in tensors})
    if manifest.num_bytes > stored_bytes:
        raise ManifestError(
            f"the byte space has {manifest.num_bytes} bytes for {stored_bytes} bytes of tensors"
        )


def check_tensor(tensor: TensorMeta) -> None:
    """Raise ManifestError unless name, dtype, shape, length and place can be; digests aside."""
    if not tensor.name or len(tensor.name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise ManifestError(f"a name has 1 to {MAX_NAME_BYTES} bytes: {tensor.name[:80]!r}")
    if len(tensor.shape) > MAX_NUM_DIMS or any(not 0 <= dim < MAX_DIM for dim in tensor.shape):
        raise ManifestError(f"{tensor.name!r}: impossible shape {list(tensor.shape)[:8]}")
    try:
        tensor.name.encode()
        length = num_bytes(tensor.dtype, tensor.shape)
    except (UsageError, UnicodeEncodeError) as error:
        raise ManifestError(f"{tensor.name!r}: {error}") from error
    if tensor.length != length:
        raise ManifestError(
            f"{tensor.name!r}: {tensor.length} bytes for {tensor.dtype} {list(tensor.shape)}"
        )
    if tensor.offset < 0 or tensor.offset % ALIGNMENT_BYTES or tensor.end > MAX_VERSION_BYTES:
        raise ManifestError(f"{tensor.name!r}: impossible offset {tensor.offset}")


def _same_bytes(tensor: TensorMeta, other: TensorMeta | None) -> bool:
    """Whether two entries are tied: one storage under two names."""
    return other is not None and (
        (tensor.offset, tensor.dtype, tensor.shape, tensor.chunk_digests)
        == (other.offset, other.dtype, other.shape, other.chunk_digests)
    )
