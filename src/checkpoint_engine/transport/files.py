"""Files handed to other processes of the host by descriptor.

The owner need not live on: what is open stays readable, so a replica can write a version, or return
to one, with no server left. One request, answered by a message for each file, with its descriptor.

    files = fetch_files([FilesAt(address=..., name=...)], {"w"})    # opens nothing by its path
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import msgspec

from checkpoint_engine.errors import HandoverError
from checkpoint_engine.sources.files import OpenFile, TensorFiles, close_all
from checkpoint_engine.transport import sockets
from checkpoint_engine.transport.channel import Channel

__all__ = ["FilesAt", "Handed", "NoFiles", "Open", "fetch_files", "serve_files"]

HANDOVER_SECONDS = 30.0


class FilesAt(msgspec.Struct, frozen=True, kw_only=True):
    """Where files can be asked for: their owner's socket, and the name that they have there."""

    address: str
    name: str


class Open(msgspec.Struct, frozen=True, tag=True):
    """Receiver to owner: hand me these files."""

    name: str


class Handed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Owner to receiver: one file, whose descriptor comes with this; `num_left` more follow."""

    file: OpenFile
    num_left: int


class NoFiles(msgspec.Struct, frozen=True, tag=True):
    """Owner to receiver: nothing has that name, or it holds no file."""


def fetch_files(places: Iterable[FilesAt], names: Collection[str]) -> TensorFiles:
    """Ask one rank after another for its files until they hold these tensors.

    Whoever calls owns them. If they do not hold all, reading says so.

    Raises:
        HandoverError: an owner is gone, another user's, or no longer has them.
        SourceError: one is no file, or is not what it was when it was registered.
        PeerLost, ProtocolError, DeadlineExceeded: an owner went away or spoke something else.
    """
    missing = set(names)
    files: list[OpenFile] = []
    descriptors: list[int] = []
    try:
        for place in places:
            if missing:
                for file, descriptor in _fetch(place):
                    descriptors.append(descriptor)
                    files.append(file)
                    missing.difference_update(file.positions)
        fetched = TensorFiles(files, descriptors)
        fetched.check()
    except BaseException:
        close_all(descriptors)
        raise
    return fetched


def _fetch(place: FilesAt) -> Iterator[tuple[OpenFile, int]]:
    connection = sockets.connect(place.address, HANDOVER_SECONDS)
    channel: Channel[Handed | NoFiles] = Channel(connection, Handed | NoFiles)
    with contextlib.closing(channel):
        channel.send(Open(place.name))
        num_left = 1
        while num_left:
            reply = channel.receive(HANDOVER_SECONDS)
            if isinstance(reply, NoFiles):
                raise HandoverError("the files are gone: their version was unregistered")
            yield reply.file, channel.take_descriptor()
            num_left = reply.num_left


def serve_files(
    channel: Channel[Any], request: Open, find: Callable[[str], TensorFiles | None]
) -> None:
    """Answer one request; raises PeerLost or DeadlineExceeded if the receiver went away."""
    files = find(request.name)
    if files is None or not files.opened:
        channel.send(NoFiles())
        return
    for number, (file, descriptor) in enumerate(files.opened, 1):
        channel.send(Handed(file=file, num_left=len(files.opened) - number), (descriptor,))
