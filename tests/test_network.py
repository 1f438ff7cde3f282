"""Which interface a node's control traffic takes."""

from __future__ import annotations

import pytest

from megatron_pmd.errors import LaunchError
from megatron_pmd.network import choose_interface


def test_a_wrong_interface_is_answered_with_those_tried_and_those_there_are() -> None:
    with pytest.raises(LaunchError, match=r"ib0, ib1 has an IPv4 address; there are .*lo \(127\.0\.0\.1\)"):
        choose_interface(["ib0", "ib1"], "127.0.0.1")


def test_the_first_interface_that_exists_is_taken() -> None:
    assert choose_interface(["ib0", "lo"], "127.0.0.1") == ("lo", "127.0.0.1")
    assert choose_interface([], "127.0.0.1") == ("lo", "127.0.0.1")


def test_a_node_that_has_no_address_is_named() -> None:
    with pytest.raises(LaunchError, match=r"no route to node no-such-node\.invalid: "):
        choose_interface([], "no-such-node.invalid")
