"""Watches one engine while it generates; without it, a stuck engine holds its requests to their deadline."""

from __future__ import annotations

import threading

from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.external import Engine
from megatron_pmd.engine.sglang_server import EngineSpec


class Watch(threading.Thread):
    """Kills the engine when it produces nothing within the deadline; its requests then fail, at once.

    They go to another engine, or, if there is none, wait until it has been started again.
    """

    def __init__(
        self, engine: Engine, spec: EngineSpec, interval_seconds: float, timeout_seconds: float
    ) -> None:
        """Starts watching. Only while the engine's weights and KV cache are resident."""
        super().__init__(name=f"watch-engine-{spec.number}", daemon=True)
        self.reason = ""
        """What was wrong with the engine, once it has been killed."""
        self._engine, self._interval, self._timeout = engine, interval_seconds, timeout_seconds
        # connections must not be shared with the thread that loads weights
        self._control = EngineControl(spec, timeout_seconds)
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(self._interval):
            # a dead engine needs no watching: whoever calls it notices
            if not self._engine.alive() or self._control.generates(self._timeout) or not self._engine.alive():
                continue
            self.reason = (
                f"engine {self._engine.spec.number} ({self._engine.url}) produced no token within "
                f"{self._timeout:g} s and was given up; log: {self._engine.log or 'its own'}"
            )
            self._engine.stop()
            return

    def stop(self) -> None:
        """Returns when no check is under way any more: after a second, or for a stuck engine its deadline."""
        self._stopped.set()
        self.join()
        self._control.close()
