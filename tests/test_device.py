"""Which parts of actor and engines may be on one device; the loop's own order is in tests/end_to_end."""

from __future__ import annotations

from itertools import combinations

import pytest

from megatron_pmd.device import Part, SharedDevice

PARTS: tuple[Part, ...] = ("parameters", "optimizer", "weights", "kv_cache")
TOGETHER = [
    {"parameters", "optimizer"},  # anchor and update
    {"parameters", "weights"},  # sync
    {"weights", "kv_cache"},  # rollout
]


@pytest.mark.parametrize("pair", list(combinations(PARTS, 2)))
def test_two_parts_come_together_only_where_a_phase_has_both(pair):
    for first, second in (pair, pair[::-1]):
        device = SharedDevice()
        device.take(first)
        if set(pair) in TOGETHER:
            device.take(second)
            assert device.held == set(pair)
        else:
            with pytest.raises(RuntimeError, match=f"{second} would come to a device that {first} has not"):
                device.take(second)
            assert device.held == {first}


def test_the_phases_of_an_iteration_follow_one_another():
    device = SharedDevice()
    device.take("weights", "kv_cache")
    for leaving, coming in (
        (("kv_cache", "weights"), ("parameters", "optimizer")),  # release
        (("optimizer",), ("weights",)),  # sync
        (("parameters",), ("kv_cache",)),  # resume
    ):
        device.leave(*leaving)
        device.take(*coming)
    assert device.held == {"weights", "kv_cache"}
