"""Back to a version that the engines keep: by hand, or because a probe says no.

Nothing is staged for it, and no server that once sent it needs to live. Every rank of a group calls
these alike; what was published, and what the probe says, its first rank finds out.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from checkpoint_engine.errors import RemoteError, UsageError
from checkpoint_engine.registry import PublishedVersion
from checkpoint_engine.update.conductor import Calls
from checkpoint_engine.update.group import Group
from checkpoint_engine.update.probe import Probe, watch
from checkpoint_engine.update.protocol import Report, decode
from checkpoint_engine.update.versions import RankMeta, Version

__all__ = ["roll_back", "watched"]

MEET_SECONDS = 60.0


def roll_back(
    group: Group, label: str | None, metas: Sequence[RankMeta], calls: Calls, timeout_seconds: float
) -> Report:
    """Return the engines to a published version; None for the one before the last.

    Raises:
        UsageError: none was published.
    """
    target = _target(group, label)
    version = Version.kept(target.digest, target.num_bytes or 0, metas)
    return group.conduct(version, target.version, calls, timeout_seconds=timeout_seconds)


def watched(
    group: Group,
    result: Report,
    probe: Probe,
    metas: Sequence[RankMeta],
    calls: Calls,
    timeout_seconds: float,
) -> Report:
    """What was published, or, if the probe says no, how it was taken back."""
    verdict = watch(probe) if group.rendezvous.rank == 0 else None
    gathered = group.rendezvous.gather(
        "probe", msgspec.msgpack.encode(verdict), probe.window_seconds + MEET_SECONDS
    )
    verdict = decode(gathered[0], RemoteError | None)
    if verdict is None:
        return result
    try:
        back = roll_back(group, None, metas, calls, timeout_seconds)
    except UsageError as error:
        return _kept_in_spite_of(result, verdict, str(error))
    if back.outcome != "published":
        return _kept_in_spite_of(result, verdict, str(back.reason))
    return msgspec.structs.replace(
        result, outcome="rolled_back", replicas=back.replicas, reason=verdict
    )


def _target(group: Group, label: str | None) -> PublishedVersion:
    """What to return to; every rank asks, as they may share no registry but the first one's."""
    chosen: bytes = b""
    if group.rendezvous.rank == 0:
        versions = [v for v in group.registry().versions() if v.lora is None]
        found = [v for v in versions if v.version == label] if label else versions[1:2]
        chosen = msgspec.msgpack.encode(found[:1])
    chosen = group.rendezvous.gather("rollback", chosen, MEET_SECONDS)[0]
    targets: list[PublishedVersion] = decode(chosen, list[PublishedVersion])
    if not targets:
        what = f"no version {label!r} was published" if label else "nothing was published before"
        raise UsageError(f"{what}; `ckpt-engine versions` lists what was")
    return targets[0]


def _kept_in_spite_of(result: Report, verdict: RemoteError, problem: str) -> Report:
    """A probe said no, and there was no way back."""
    message = f"{verdict.message}; the way back failed: {problem}"
    return msgspec.structs.replace(result, reason=msgspec.structs.replace(verdict, message=message))
