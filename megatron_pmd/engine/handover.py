"""How engines and actors take turns: on the devices they share, or with engines that are only paused."""

from __future__ import annotations

from collections.abc import Callable

from megatron_pmd.config import PauseMode
from megatron_pmd.device import SharedDevice
from megatron_pmd.engine.fleet import Fleet
from megatron_pmd.engine.own import OwnEngine
from megatron_pmd.errors import EngineError
from megatron_pmd.observe.subphases import SubphaseClock


class Handover:
    """The engines' memory. Collective: every actor rank calls every method, in the same order."""

    def __init__(self, fleet: Fleet, clock: SubphaseClock, device: SharedDevice | None = None) -> None:
        """clock: measures the flush. device: the account that the actor keeps, too; engines elsewhere have
        devices of their own.
        """
        self._fleet, self._clock = fleet, clock
        self._device = SharedDevice() if fleet.elsewhere or device is None else device
        self.note_start()

    def note_start(self) -> None:
        """Engines that start come with their weights and their cache."""
        self._device.held |= {"weights", "kv_cache"}

    def before_restart(self) -> None:
        """RuntimeError if the actor still holds what an engine that starts would have to do without."""
        self._device.take("weights", "kv_cache")

    def release(self) -> None:
        """Engines give their memory to the actors: the KV cache first, then the weights."""
        self._on_living(lambda own: own.release("kv_cache", "weights"))
        self._device.leave("kv_cache", "weights")

    def _on_living(self, action: Callable[[OwnEngine], None]) -> None:
        """Run the action on every leader; an engine that fails in it, because it is dead or stuck, is killed.

        That frees its memory too. The next update starts it again.
        """

        def act(own: OwnEngine) -> int | None:
            try:
                action(own)
            except EngineError:
                if own.why_lost(probe=True) is None:
                    raise
                return own.number
            return None

        self._fleet.kill([number for number in self._fleet.on_leaders(act) if number is not None])

    def resume_weights(self) -> None:
        """Engines take the memory of their weights back; its contents are undefined."""
        self._device.take("weights")
        self._fleet.on_leaders(lambda own: own.resume("weights"))

    def resume_cache(self) -> None:
        """Engines take the KV cache back and forget what earlier weights left in it."""

        def resume(own: OwnEngine) -> None:
            own.resume("kv_cache")
            with self._clock("flush"):
                own.calls.flush_cache()

        self._device.take("kv_cache")
        self._on_living(resume)


class Pauses(Handover):
    """For engines with devices of their own (rollout.placement=separate): they keep their memory.

    An update finds them generating. They are paused for it. With `retract` they compute what they have of
    running responses again under the new weights: each token is of one policy. With `in_place` they go on
    with the cache that they have.
    """

    def __init__(self, fleet: Fleet, clock: SubphaseClock, mode: PauseMode) -> None:
        super().__init__(fleet, clock)
        self._mode = mode

    def before_restart(self) -> None:
        """An engine finds its own device as at its first start."""

    def release(self) -> None:
        """Nothing is to be given up."""

    def resume_weights(self) -> None:
        """Engines stop generating, and can take weights."""

        def pause(own: OwnEngine) -> None:
            own.unwatch()
            own.calls.pause(self._mode)

        with self._clock("pause"):
            self._fleet.on_leaders(pause)

    def resume_cache(self) -> None:
        """Engines forget what earlier weights left in their cache.

        With `in_place` SGLang cannot, as running requests use it: no request of these weights finds it
        (rollout/turn_sampler.py), and it makes room as others come.
        """
        if self._mode == "in_place":
            return
        with self._clock("flush"):
            self._on_living(lambda own: own.calls.flush_cache(paused=True))

    def go_on(self) -> None:
        """Engines generate again."""
        self._on_living(lambda own: own.calls.go_on())
