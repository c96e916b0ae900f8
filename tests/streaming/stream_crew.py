"""Trainers and samplers in processes that are used again, since it takes seconds to start one."""

from __future__ import annotations

from typing import Any

from children import Child, call_all, wait_until

SCRIPT = "streaming/stream_member.py"


class Crew:
    """Rank 0, which sends, and the others."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def meet(self, kind: str, num: int, *settings: dict[str, Any]) -> list[Child]:
        """So many ranks that have met; settings are everybody's, or each one's."""
        for index in range(num):
            self.child(index)
        ranks = self._children[:num]
        each = [settings[0] if len(settings) == 1 else settings[index] for index in range(num)]
        self._metadata = ranks[0].call("make", kind=kind, is_master=True, settings=each[0])
        for rank, own in list(zip(ranks, each, strict=True))[1:]:
            rank.call("make", kind=kind, is_master=False, settings=own)
        numbers = list(range(num))
        call_all(ranks, "meet", rank=numbers, world_size=num, metadata=self._metadata)
        return ranks

    def child(self, index: int) -> Child:
        """This process, which is started if need be."""
        while len(self._children) <= index:
            self._children.append(Child(SCRIPT))
        if not self._children[index].alive:
            self._children[index].close()
            self._children[index] = Child(SCRIPT)
        return self._children[index]

    def come_back(self, rank: int, kind: str, num: int, settings: dict[str, Any]) -> Child:
        """A process in the place of one that died."""
        child = self.child(rank)
        child.call("make", kind=kind, is_master=False, settings=settings)
        child.call("meet", rank=rank, world_size=num, metadata=self._metadata)
        return child

    def leave(self) -> None:
        """All finalize; rank 0 last, which waits for the others."""
        for child in reversed(self._children):
            if child.alive:
                child.forget()
                self._finalize(child)

    @staticmethod
    def _finalize(child: Child) -> None:
        try:
            child.call("finalize")
        except RuntimeError:  # it may be dying, as a test has told it to
            wait_until(lambda: not child.alive, "the end of a process that does not finalize")

    def close(self) -> None:
        for child in self._children:
            child.close()
