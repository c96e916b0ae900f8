"""A version staged in this host's memory, as tensors.

The bytes lie in the segments of one or more ranks, each mapped once; tensors are views of them and
keep their map alive. A version may be kept after its update, as the way back of the next one.

    staged = Staged.attach(manifest, parts, attachments)
    staged.verify(pool)
    for name, tensor in staged.tensors():
        ...
    staged.release()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from checkpoint_engine.codec.digest import first_mismatch
from checkpoint_engine.dtypes import torch_dtype, torch_shape
from checkpoint_engine.errors import ManifestError, VerificationError
from checkpoint_engine.manifest import Manifest, TensorMeta
from checkpoint_engine.memory import Pace, Workers
from checkpoint_engine.transport.handover import Attachment, Attachments, Part

__all__ = ["Staged"]


class Staged:
    """A manifest and the mapped memory behind it. Make one with `attach`.

    Attributes:
        manifest: the version's tensors, validated.
    """

    way_back = "staged"

    def __init__(
        self, manifest: Manifest, held: Sequence[tuple[Part, Attachment]], attachments: Attachments
    ) -> None:
        self.manifest = manifest
        self._held = list(held)
        self._attachments = attachments

    @classmethod
    def attach(cls, manifest: Manifest, parts: Sequence[Part], attachments: Attachments) -> Staged:
        """Hold and map every part.

        Raises:
            HandoverError: a part's owner is gone or not trusted.
            ManifestError: the parts are not the manifest's bytes.
        """
        staged = cls(manifest, [], attachments)
        try:
            for part in sorted(parts, key=lambda part: part.offset):
                attachment = attachments.attach(part.address, part.segment)
                staged._held.append((part, attachment))
                if part.start < 0 or part.start + part.length > len(attachment.memory):
                    raise ManifestError("a part lies beyond the end of its segment")
            staged._check_cover()
        except BaseException:
            staged.release()
            raise
        return staged

    def memory(self, start: int, end: int) -> memoryview:
        """Bytes [start, end) of the flat space, which lie in one part."""
        for part, attachment in self._held:
            if part.offset <= start and end <= part.offset + part.length:
                shift = part.start - part.offset
                return attachment.memory[start + shift : end + shift]
        raise ManifestError(f"bytes {start} to {end} lie in no part of the version")

    @property
    def is_pinned(self) -> bool:
        """Whether a GPU reads all of it without help."""
        return all(attachment.is_pinned for _, attachment in self._held)

    def spans(self, start: int, end: int) -> Iterator[memoryview]:
        """Bytes [start, end) of the flat space, cut where one part ends and the next begins."""
        for part, attachment in self._held:
            first, last = max(start, part.offset), min(end, part.offset + part.length)
            if first < last:
                shift = part.start - part.offset
                yield attachment.memory[first + shift : last + shift]

    def tensor(self, meta: TensorMeta) -> torch.Tensor:
        """A view of one tensor; writing into it stays private to this process."""
        dtype, shape = torch_dtype(meta.dtype), torch_shape(meta.dtype, meta.shape)
        if meta.length == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.memory(meta.offset, meta.end), dtype=dtype).view(shape)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every name with a view of its tensor."""
        return ((meta.name, self.tensor(meta)) for meta in self.manifest.tensors)

    def chunk(self, meta: TensorMeta, start: int, end: int) -> Callable[[], memoryview]:
        """A view of some bytes of a tensor, found now: that takes longer than a pause may."""
        view = self.memory(meta.offset + start, meta.offset + end)
        return lambda: view

    def is_there(self) -> bool:
        """True: what is held stays."""
        return True

    def discard_writes(self) -> None:
        """Undo what was written into tensors of this version, and show the staged bytes again."""
        for _, attachment in self._held:
            attachment.discard_writes()

    def verify(self, pool: Workers) -> None:
        """Recompute the digest of every chunk.

        Raises:
            VerificationError: the bytes are not those of the manifest; names the first tensor.
        """
        pace = Pace.of_environment()

        def paced(start: int, end: int) -> memoryview:
            pace.take(end - start)
            return self.memory(start, end)

        wrong = first_mismatch(self.manifest.chunks(), paced, pool)
        if wrong is not None:
            raise VerificationError(
                f"tensor {wrong.tensor!r}: its staged bytes are not those of the manifest; "
                "nothing was changed, register the checkpoint again"
            )

    def rest(self) -> None:
        """Nothing: what is kept is kept mapped."""

    def release(self) -> None:
        """Let go of the memory; tensors that still view it keep it until they go."""
        while self._held:
            part, attachment = self._held.pop()
            self._attachments.release(part.address, part.segment, attachment)

    def _check_cover(self) -> None:
        end = 0
        for part, _ in self._held:
            if part.offset != end or part.length < 0:
                raise ManifestError(f"the parts leave a hole or overlap at byte {end}")
            end += part.length
        if end != self.manifest.num_bytes:
            raise ManifestError(f"the parts have {end} of {self.manifest.num_bytes} bytes")
        for meta in self.manifest.tensors:
            if meta.length:
                self.memory(meta.offset, meta.end)
