"""Every message of an update, and the report that it ends with.

Three parties talk. A *session* runs inside an engine's worker and speaks with the *rank* whose
handle it was given, over a Unix socket. The ranks speak with the *coordinator*, which is rank 0,
through two logs: events go up, decisions come down. Tensor bytes travel on none of these ways.

    session                rank                    coordinator
       ── Hello ──────────►  ── Joined ───────────►
       ◄───────── Offer ──                           (all staged)  ◄── Staged
       ── Ready ──────────►  ── Voted(Ready) ─────►
       ◄─ Proceed(apply) ──  ◄── Decision(apply) ──  all ready
       ── Applied ────────►  ── Voted(Applied) ───►
       ◄─ Proceed(publish) ─ ◄── Decision(publish) ─ all applied, recorded
       ── Confirmed ──────►  ── Voted(Confirmed) ─►
                             ◄── Decision(end) ────  report

At any point a session may send `Withdrawn` instead, and a rank `Stop`: before apply that aborts,
after it that rolls back.
"""

from __future__ import annotations

from typing import Any

import msgspec

from checkpoint_engine.errors import MALFORMED, ProtocolError, RemoteError
from checkpoint_engine.manifest import Version
from checkpoint_engine.timeline import Span
from checkpoint_engine.transport.files import FilesAt
from checkpoint_engine.transport.handover import Part
from checkpoint_engine.transport.remote import Remote

__all__ = [
    "PROTOCOL",
    "Applied",
    "Confirmed",
    "Deadlines",
    "Decision",
    "Event",
    "FromRank",
    "FromSession",
    "Hello",
    "Joined",
    "Left",
    "Offer",
    "Proceed",
    "Ready",
    "ReplicaReport",
    "Report",
    "Returned",
    "Staged",
    "Stop",
    "Vote",
    "Voted",
    "Withdrawn",
    "decode",
    "explain",
]

PROTOCOL = 1


class _Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A struct that says its own kind on the wire."""


class Deadlines(msgspec.Struct, frozen=True, kw_only=True):
    """The longest waits of an update.

    Attributes:
        ready_seconds: from the opening until every engine is ready; nothing is paused yet.
        pause_seconds: from the first pause until every engine has applied; requests wait.
        return_seconds: from a stop until every engine is back at its base.
    """

    ready_seconds: float
    pause_seconds: float
    return_seconds: float

    @property
    def decision_seconds(self) -> float:
        """How long whoever has applied waits for "publish".

        Longer than the slowest is waited for, or a decision to go on without it would come too
        late for the others.
        """
        return 1.25 * self.pause_seconds

    @classmethod
    def of(
        cls,
        timeout_seconds: float,
        num_bytes: int,
        *,
        mode: str = "staged",
        is_lora: bool = False,
    ) -> Deadlines:
        """Deadlines within a user's timeout.

        No pause is longer than ten seconds and 0.5 GB/s, or 0.1 GB/s where a disk may be read. A
        LoRA adapter may have to wait for requests that use the one before.
        """
        bytes_per_second = 0.5e9 if mode == "staged" else 0.1e9
        pause_seconds = min(timeout_seconds, 10 + num_bytes / bytes_per_second)
        if is_lora:
            pause_seconds = timeout_seconds
        return cls(
            ready_seconds=timeout_seconds,
            pause_seconds=pause_seconds,
            return_seconds=pause_seconds + min(timeout_seconds, 30.0),
        )


# ── session → rank ──────────────────────────────────────────────────────────────────────────


class Hello(_Message, frozen=True):
    """A worker of an engine is here.

    Attributes:
        protocol: what it speaks.
        replica: what to call it in reports.
        engine: equal for the workers of one engine, different for different engines.
        rank: among the workers of its engine.
        world_size: how many workers its engine has; all of them must say hello.
        base: digest of the version that it serves, None if it does not know.
        epoch: the highest epoch it has seen; an older update is refused.
        undecided: update that it had to leave without learning the decision, if any.
    """

    protocol: int
    replica: str
    engine: str
    rank: int
    world_size: int
    base: str | None = None
    epoch: int = 0
    undecided: str | None = None


class Ready(_Message, frozen=True):
    """The bytes are attached and verified, or to be had, and fit the engine. Nothing has changed.

    Attributes:
        way_back: how it would return to its base: "staged", "snapshot", "source", "peer" or
            "none".
    """

    way_back: str
    spans: tuple[Span, ...] = ()


class Applied(_Message, frozen=True):
    """The new weights are in place and checked; requests wait.

    Attributes:
        digest: of the live parameters under the version's names; None where the engine hides them.
        served_digest: of all live parameters, after casts and post-processing.
    """

    digest: str | None
    served_digest: str | None
    spans: tuple[Span, ...] = ()


class Confirmed(_Message, frozen=True):
    """The new version is labelled and served.

    Attributes:
        pause_seconds: how long requests waited.
        error: what failed after the label changed (a cache flush), if anything did.
    """

    pause_seconds: float
    error: RemoteError | None = None
    spans: tuple[Span, ...] = ()


class Withdrawn(_Message, frozen=True):
    """A "no": this worker takes no further part, and awaits only the `Stop` that says why.

    Attributes:
        torn: False if it serves its base as before; True if it could not get back to it.
    """

    error: RemoteError
    torn: bool = False
    pause_seconds: float = 0.0
    spans: tuple[Span, ...] = ()


# ── rank → session ──────────────────────────────────────────────────────────────────────────


class Offer(_Message, frozen=True):
    """What is offered, where its bytes lie on this host, and how long to wait for decisions.

    Attributes:
        manifest: msgpack of the Manifest; empty to return to a version that the session keeps.
        parts: the staged bytes; none if they are streamed.
        files: where to ask for the files of a streamed version; none if it is not in files.
        remote: the peers that a streamed version is read from; none if it is here.
        follower: True for a session that does not vote, such as a draft model's.
        require_rollback: refuse unless there is a way back.
    """

    update: str
    epoch: int
    version: Version
    manifest: bytes
    parts: tuple[Part, ...]
    deadlines: Deadlines
    files: tuple[FilesAt, ...] = ()
    remote: Remote | None = None
    follower: bool = False
    require_rollback: bool = False


class Proceed(_Message, frozen=True):
    """Go on with `step`: "apply" or "publish"."""

    step: str


class Stop(_Message, frozen=True):
    """Abort, or roll back where weights have changed; `quarantine`: and do not serve."""

    reason: str
    quarantine: bool = False


Vote = Ready | Applied | Confirmed | Withdrawn
FromSession = Hello | Ready | Applied | Confirmed | Withdrawn
FromRank = Offer | Proceed | Stop


# ── rank → coordinator ──────────────────────────────────────────────────────────────────────


class Staged(_Message, frozen=True):
    """A rank's host holds every byte of the version, or the rank says why not.

    Attributes:
        num_requests: how many calls of engines this rank is going to make, at most.
        open_ended: whether a call may reach more than one engine, as a caller's own function may.
    """

    rank: int
    num_requests: int = 1
    open_ended: bool = False
    bytes_sent: int = 0
    error: RemoteError | None = None
    spans: tuple[Span, ...] = ()


class Joined(_Message, frozen=True):
    """A session has said hello on this rank's handle; a follower came after the vote."""

    session: str
    rank: int
    hello: Hello
    follower: bool = False


class Voted(_Message, frozen=True):
    """A session has voted."""

    session: str
    vote: Vote


class Left(_Message, frozen=True):
    """A session's connection ended before the protocol did."""

    session: str
    error: RemoteError


class Returned(_Message, frozen=True):
    """One of this rank's requests to its engines has returned, or raised."""

    rank: int
    request: int = 0
    error: RemoteError | None = None


Event = Staged | Joined | Voted | Left | Returned


# ── coordinator → rank, and the report ──────────────────────────────────────────────────────


class ReplicaReport(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine's worker ended.

    `outcome`: "published", "published_unconfirmed", "kept" (its base, as before),
    "quarantined" (its base, and not serving), "torn", or "lost" (dead or silent). `undecided` is
    the update before this one, if it had to leave that without learning the decision.
    """

    name: str
    rank: int
    outcome: str
    digest: str | None = None
    served_digest: str | None = None
    way_back: str | None = None
    pause_seconds: float | None = None
    follower: bool = False
    undecided: str | None = None
    error: RemoteError | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What an update did. `bytes` is the version's size, `bytes_sent` what left a host's memory.

    `mode`: "staged"; "streamed", and then `why`; or "kept", back to what each replica still had.
    `outcome`: "published", "rolled_back" (weights had changed and were changed back), "aborted"
    (none had), or, on a rank that is not among those that update, "not_taking_part". `degraded`
    names followers that failed. `verified` is True when every
    published replica recomputed the version's digest from its live parameters. `lora` is what the
    adapter is called that this was about; None for weights.
    """

    update: str
    epoch: int
    version: str
    digest: str
    base: str | None
    mode: str
    outcome: str
    bytes: int
    bytes_sent: int
    seconds: dict[str, float]
    pause_seconds: float | None
    verified: bool
    replicas: tuple[ReplicaReport, ...]
    degraded: tuple[str, ...] = ()
    reason: RemoteError | None = None
    spans: tuple[Span, ...] = ()
    why: str = ""
    lora: str | None = None

    @classmethod
    def not_taking_part(cls, version: str) -> Report:
        """Of a rank whose engines are not concerned."""
        return cls(
            update="", epoch=0, version=version, digest="", base=None, mode="", bytes=0,
            outcome="not_taking_part", bytes_sent=0, seconds={}, pause_seconds=None,
            verified=False, replicas=(),
        )  # fmt: skip


class Decision(_Message, frozen=True):
    """What the coordinator has decided, for every rank.

    Attributes:
        step: "enter", "apply", "publish", "stop" or "end".
        proceed: the sessions that go on with "apply" or "publish".
        quarantine: those that stop although others go on, and must not serve.
        report: with "end".
    """

    step: str
    reason: str = ""
    proceed: tuple[str, ...] = ()
    quarantine: tuple[str, ...] = ()
    report: Report | None = None


def decode(data: bytes, kind: Any) -> Any:
    """A `kind`, or one of its union, that another rank put into a log.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except MALFORMED as error:
        raise ProtocolError(f"a malformed message of another rank: {error}") from error


def explain(report: Report) -> str:
    """The first cause in one line, then what became of each replica, then the remote traceback."""
    reason = report.reason
    first = reason or "recorded, but no replica lived to confirm it"
    lines = [f"update to {report.version!r} {report.outcome.replace('_', ' ')}: {first}"]
    lines += [f"  {replica.name}: {replica.outcome}" for replica in report.replicas]
    if reason is not None and reason.traceback:
        lines += [f"remote traceback ({reason.where}):", reason.traceback.rstrip()]
    return "\n".join(lines)
