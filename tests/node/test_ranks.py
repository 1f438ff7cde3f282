"""What the ranks of a node are given."""

from __future__ import annotations

import os

import pytest

from megatron_pmd.config import override
from megatron_pmd.node.ranks import Nodes, threads_per_rank
from recipes import recipe


def test_ranks_that_step_their_optimizer_on_the_host_share_the_cores_of_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's AdamW is as fast as it has threads; else one is enough on a GPU."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(100)))
    config, nodes = recipe("qwen2_5_7b_dapo_8xh100"), Nodes(1, 0, 8, "localhost:0")
    assert threads_per_rank(config, nodes) == 1
    assert threads_per_rank(override(config, ["optimizer.offload=0.5"]), nodes) == 12
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert threads_per_rank(override(config, ["optimizer.offload=0.5"]), nodes) == 1
