"""What a sampler serves: its model's weights, and the adapters that are attached to it.

Each goes back to the version before if the transaction fails. Requests are held once for all of
them, and go on when none is torn.

    seats = Seats(sampler)
    outcome = seats.take(order, held, "sampler 0", lambda adapter: take_part(keys, adapter))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from checkpoint_engine.adapters.attached import AttachedAdapter
from checkpoint_engine.adapters.base import Adapter, Content, Identity, Served
from checkpoint_engine.adapters.held import Held
from checkpoint_engine.errors import UpdateRefused, UsageError
from checkpoint_engine.manifest import Version
from checkpoint_engine.streaming.orders import Order
from checkpoint_engine.streaming.sampled import (
    Sampler,
    loads_by_itself,
    module_of,
    places_of,
    weights_adapter,
)
from checkpoint_engine.update.session import Outcome

__all__ = ["Seats"]

WEIGHTS = ""  # their seat, beside those of adapters, which have names


class Seats:
    """What a sampler serves: its weights, and the adapters on them.

    Attributes:
        version: of the weights that are served, None if none was received or they are torn.
        adapters: versions of those that are attached, by name.

    Raises:
        UsageError: the sampler has neither a model nor a loader.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._requests = _Requests(sampler)
        self._writers: dict[str, Adapter] = {WEIGHTS: weights_adapter(sampler)}
        self._held: dict[str, Held] = {}
        self._last: dict[str, Version] = {}  # that was published, also of what is torn since
        self._module, self._places = module_of(sampler), places_of(sampler)
        self._last_base: str | None = None
        self.version: Version | None = None
        self.adapters: dict[str, Version] = {}

    def take(
        self, order: Order, held: Held, name: str, transact: Callable[[Adapter], Outcome]
    ) -> Outcome:
        """Offer a version to a transaction over all samplers; it is released unless it is served.

        Args:
            order: what it is.
            held: its tensors.
            name: the sampler's, in what is said of it.
            transact: takes part in the transaction with an adapter.
        """
        self._follow()
        place = _place(order)
        writer = self._writer(place)
        writer.identity = Identity(replica=name, engine=name)
        published = partial(self._published, order)
        seat = _Seat(writer, held, self._refusal(order), published, self._requests)
        try:
            outcome = transact(seat)
        except BaseException as error:
            if seat.is_paused:  # nobody knows how much was written
                writer.tear(f"{type(error).__name__}: {error}")
                self._torn(order)
            raise
        if outcome.state == "torn":
            self._torn(order)
        if outcome.state == "kept" and place in self._requests.torn:
            self._mended(place, writer.base())
        if outcome.state == "published":
            before, self._held[place] = self._held.get(place), held
            if before is not None:
                before.release()  # an adapter would keep it to return to it later
        self._places = places_of(self._sampler)
        return outcome

    def _writer(self, place: str) -> Adapter:
        if loads_by_itself(self._sampler):
            return self._writers[WEIGHTS]  # an adapter is refused
        if place not in self._writers:
            self._writers[place] = AttachedAdapter(self._sampler, place, self._base)
        return self._writers[place]

    def _follow(self) -> None:
        """Begin with what the sampler has now, if that is not what was left here."""
        if (module := module_of(self._sampler)) is not self._module:
            self._module, self._last_base = module, None
            self._writers, self._held, self._last, self.adapters = {}, {}, {}, {}
            self._requests.torn &= {WEIGHTS}
        elif places_of(self._sampler) == self._places:
            return
        self._writers[WEIGHTS] = weights_adapter(self._sampler)
        self._held.pop(WEIGHTS, None)
        self._places, self.version = places_of(self._sampler), None

    def _base(self) -> str | None:
        return self.version.digest if self.version else None

    def _refusal(self, order: Order) -> str:
        if order.kind == "adapter" and loads_by_itself(self._sampler):
            return (
                "this sampler loads weights by itself, and has no model to which an adapter could "
                "be attached; vLLM and SGLang take adapters by ParameterServer.update(lora=...)"
            )
        attached = [*self._all_attached(), *self._own()]
        if order.kind in ("weights", "merged") and attached:
            return (
                f"adapters are attached here ({', '.join(attached)}), and would be applied to what "
                "was merged: take them off by detach_adapter(name), or sync with "
                "merge_and_sync=False"
            )
        others = [name for name in self._on_another(order.version) if name != order.adapter]
        if order.kind == "base" and others:
            return (
                f"adapters are attached here ({', '.join(others)}) that are made for another base: "
                "take them off by detach_adapter(name) first"
            )
        return ""

    def _all_attached(self) -> list[str]:
        return sorted({*self.adapters, *self._requests.torn} - {WEIGHTS})

    def _own(self) -> list[str]:
        """The adapters that the sampler's model has, and that did not come from here."""
        if self._module is None or not hasattr(self._sampler.model, "get_base_model"):
            return []
        return sorted({*self._sampler.model.peft_config} - {*self._all_attached()})

    def _on_another(self, base: Version) -> list[str]:
        """The adapters that are not known to be for this base, if it is not served already.

        The sampler's own are for its first one.
        """
        if base.digest == self._base():
            return []
        known = [name for name, one in self.adapters.items() if one.parent == base.digest]
        own = [] if self._last_base in (None, base.digest) else self._own()
        return [name for name in (*self._all_attached(), *own) if name not in known]

    def _published(self, order: Order) -> None:
        """This is what is served now; requests wait still."""
        self._requests.torn.discard(_place(order))
        self._last[_place(order)] = order.version
        if order.kind == "adapter":
            self.adapters[order.adapter] = order.version
            return
        if order.kind == "base":
            for name in self._on_another(order.version):  # until the one comes that is for it
                self._take_off(name)
        self.version, self._last_base = order.version, order.version.digest

    def _torn(self, order: Order) -> None:
        """What is served is no version; requests wait until it is mended."""
        self._requests.torn.add(_place(order))
        if order.kind == "adapter":
            self.adapters.pop(order.adapter, None)
        else:
            self.version = None

    def _mended(self, place: str, digest: str | None) -> None:
        """What was torn may be as it was before that, once it was rolled back."""
        last = self._last.get(place)
        if last is None or last.digest != digest:
            return
        self._requests.torn.discard(place)
        if place == WEIGHTS:
            self.version = last
        else:
            self.adapters[place] = last
        self._requests.release()

    def detach(self, name: str) -> None:
        """Take an adapter off; one that is torn, too, and then requests go on.

        Raises:
            UsageError: there is none of that name.
        """
        names = [*self._all_attached(), *self._own()]
        if name not in names:
            raise UsageError(f"no adapter {name!r} is attached; there are {names}")
        self._take_off(name)
        self._requests.release()

    def _take_off(self, name: str) -> None:
        AttachedAdapter(self._sampler, name, self._base).detach()
        self._writers.pop(name, None)
        self._held.pop(name, None)
        self._last.pop(name, None)
        self.adapters.pop(name, None)
        self._requests.torn.discard(name)


class _Requests:
    """A sampler's.

    Attributes:
        torn: whose seats are; while there are any, requests are held.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._are_held = False
        self.torn: set[str] = set()

    def hold(self, timeout_seconds: float) -> None:
        """Stop them, unless they are."""
        if not self._are_held:
            self._sampler.hold_requests(timeout_seconds)
            self._are_held = True

    def release(self) -> None:
        """Let them go on, if they were held here and may."""
        if self._are_held and not self.torn:
            self._are_held = False  # even if this fails: who writes next is to hold them again
            self._sampler.release_requests()


class _Seat:
    """One version, the adapter that writes it, and the requests that wait meanwhile.

    The methods are those of `adapters.base.Adapter`.

    Attributes:
        is_paused: from when requests have stopped until they go on.
    """

    epoch = 0

    def __init__(
        self,
        writer: Adapter,
        held: Held,
        refusal: str,
        published: Callable[[], None],
        requests: _Requests,
    ) -> None:
        self.identity = writer.identity
        self._writer, self._held, self._refusal = writer, held, refusal
        self._published, self._requests = published, requests
        self.is_paused = False

    @property
    def undecided(self) -> str | None:
        """What the writer remembers from one version to the next."""
        return self._writer.undecided

    @undecided.setter
    def undecided(self, update: str | None) -> None:
        self._writer.undecided = update

    def base(self) -> str | None:
        """The writer's."""
        return self._writer.base()

    def recall(self, digest: str) -> Content | None:
        """What was received is here already."""
        return self._held

    def prepare(self, content: Content, version: Version) -> str:
        """Refuse what cannot be served here."""
        if self._refusal:
            content.release()
            raise UpdateRefused(self._refusal)
        return self._writer.prepare(content, version)

    def abort(self) -> None:
        """As the writer."""
        self._writer.abort()

    def pause(self, timeout_seconds: float) -> None:
        """Stop requests."""
        self._requests.hold(timeout_seconds)
        self.is_paused = True
        self._writer.pause(timeout_seconds)

    def apply(self) -> None:
        """As the writer."""
        self._writer.apply()

    def check(self) -> Served:
        """As the writer."""
        return self._writer.check()

    def publish(self) -> None:
        """It is what is served."""
        self._writer.publish()
        self._published()

    def roll_back(self) -> None:
        """As the writer."""
        self._writer.roll_back()

    def resume(self) -> None:
        """Let requests go on."""
        self._writer.resume()
        self.is_paused = False
        self._requests.release()

    def quarantine(self, reason: str) -> None:
        """As the writer."""
        self._writer.quarantine(reason)

    def tear(self, reason: str) -> None:
        """As the writer."""
        self._writer.tear(reason)


def _place(order: Order) -> str:
    """The adapter that is replaced, or the weights."""
    return order.adapter if order.kind == "adapter" else WEIGHTS
