"""The control of a run of one rank, without a process group."""

from __future__ import annotations

from megatron_pmd.distributed import Control
from megatron_pmd.heartbeat import Heartbeat


class OnlyRank(Control):
    rank = node = 0
    world = 1
    is_driver = True
    heartbeat = Heartbeat()

    def __init__(self):
        pass

    def from_driver(self, value=None):
        return value

    def all_gather(self, value):
        return [value]
