"""Over what the ranks' groups talk."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_pmd.actor import parallel
from megatron_pmd.config import Layout


@pytest.mark.parametrize(("cuda", "backends"), [(True, {"cuda": "nccl"}), (False, {"cpu": "gloo"})])
def test_groups_that_megatron_core_forms_connect_their_ranks_once(monkeypatch, cuda, backends):
    """They inherit the default group's backends, as torch reads them; each is a mesh of its own."""
    given = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.append(backend))
    monkeypatch.setattr(parallel, "form_groups", lambda layout, seed, timeout_seconds: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    parallel.initialize(Layout(), seed=0, timeout_seconds=60)
    read = dist.BackendConfig(dist.Backend(given[0])).get_device_backend_map()
    assert read.items() >= backends.items() and len(set(read.values())) == 1
