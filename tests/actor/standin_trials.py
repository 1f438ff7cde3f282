"""Training with all stand-ins but one, in children of a process that imported everything without any.

`python -m tests.actor.standin_trials MODELS OUTPUT.json`, see test_standins.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from megatron_pmd.actor.cpu import bridge_import, standins

CHILD_SECONDS = 90
TWO_RANKS = {
    # ranks exchange as many tokens as each other's experts were chosen for
    "split_sizes": dict(expert=2, data=2),
    "pinned_memory": dict(context=2),
}
LATENT = ("latent_linear", "pinned_memory")
"""Stand-ins that a model with latent attention needs."""


def in_children(action: Callable[[], object], ranks: int = 1) -> str:
    """What goes wrong first when `ranks` forked processes run the action together; "" if nothing does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        waiting = {_fork(action, rank, ranks, port, Path(folder) / str(rank)): rank for rank in range(ranks)}
        deadline = time.monotonic() + CHILD_SECONDS
        outcome = ""
        while waiting and not outcome:
            for child, rank in list(waiting.items()):
                if os.waitpid(child, os.WNOHANG)[0]:
                    del waiting[child]
                    outcome = outcome or (Path(folder) / str(rank)).read_text()
                    _end(child)
            if time.monotonic() > deadline:
                outcome = outcome or f"not done after {CHILD_SECONDS} s"
            time.sleep(0.05)
        for child in waiting:  # it waits for a rank that failed
            _end(child)
            os.waitpid(child, 0)
    return outcome


def _end(child: int) -> None:
    """End what is left of a child's processes; saving a checkpoint starts some."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _fork(action: Callable[[], object], rank: int, ranks: int, port: str, report: Path) -> int:
    report.write_text("died without a word")
    if child := os.fork():
        return child
    os.setsid()
    numbers = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(numbers, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    try:
        action()
        report.write_text("")
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        report.write_text(
            f"{type(error).__name__}: {error} [{Path(place.filename).name}:{place.lineno}]"[:2000]
        )
    os._exit(0)


def train_without(name: str | None, model: Path, layout: dict[str, int]) -> None:
    """Log-probs, two steps, save, load and a step of a tiny model; raises where a number is wrong."""
    standins.install(leave_out=(name,) if name else ())

    from tests.actor import actor_programs

    reference = torch.load(model / "reference.pt", weights_only=False)
    with tempfile.TemporaryDirectory() as folder:
        config = actor_programs.config_for(model, layout)
        shared = actor_programs.start(config.layout).from_driver(folder)
        result = actor_programs.train_one(config, Path(shared))
    if result["holds_logits"] and result["anchors"][0].max_absolute > 1e-4:
        raise AssertionError(f"log-probs are off by {result['anchors'][0].max_absolute}")
    for (_, _, norm), step in zip(result["steps"], reference.steps, strict=False):
        if abs(norm / step.gradient_norm - 1) > 1e-4:
            raise AssertionError(f"gradient norm is {norm}, should be {step.gradient_norm}")
    for key, weight in result["weights"].items():
        if not torch.allclose(weight.double(), reference.steps[1].weights[key], rtol=0, atol=2e-6):
            raise AssertionError(f"{key} is wrong after two steps")
    if result["third"][0] != result["third_resumed"][0]:
        raise AssertionError(f"resumed: {result['third_resumed'][0]}, uninterrupted: {result['third'][0]}")
    for key, weight in result["third"][1].items():
        if not torch.equal(weight, result["third_resumed"][1][key]):
            raise AssertionError(f"{key} is wrong after resuming")


def exchange_unequal_parts(name: str | None) -> None:
    """What experts do under expert_tensor=2, expert=2 (four ranks) with two ranks: 1 and 3 rows."""
    standins.install(leave_out=(name,) if name else ())
    from megatron.core.tensor_parallel import mappings

    torch.distributed.init_process_group("gloo")
    rank, sizes = torch.distributed.get_rank(), [1, 3]
    rows = torch.arange(4.0)[:, None].repeat(1, 2)
    own = slice(0, 1) if rank == 0 else slice(1, 4)
    group = torch.distributed.group.WORLD
    if not torch.equal(mappings._gather_along_first_dim(rows[own], group, sizes), rows):
        raise AssertionError("the gathered rows are wrong")
    if not torch.equal(mappings._reduce_scatter_along_first_dim(rows, group, sizes), 2 * rows[own]):
        raise AssertionError("the scattered sums are wrong")


def rotate_packed_rows() -> None:
    """All sequences of a row at once, as megatron-core one by one: values and gradients, bit for bit."""
    from megatron.core.models.common.embeddings import rope_utils

    one_by_one, turn = rope_utils._apply_rotary_pos_emb_thd, rope_utils._apply_rotary_pos_emb_bshd
    standins.rotate_at_once()
    bounds, angles = torch.tensor([0, 4, 16, 20, 28], dtype=torch.int32), torch.randn(12, 1, 1, 8)
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        rows, weights = torch.randn(28 // size, 3, 10, requires_grad=True), torch.randn(28 // size, 3, 10)
        group = mock.Mock(size=lambda size=size: size, rank=lambda rank=rank: rank)
        found, turns = [], []
        for rotate in (one_by_one, rope_utils._apply_rotary_pos_emb_thd):
            with mock.patch.object(rope_utils, "_apply_rotary_pos_emb_bshd", wraps=turn) as counted:
                rotated = rotate(rows, bounds, angles, cp_group=group)
            found.append((rotated, *torch.autograd.grad((rotated * weights).sum(), rows)))
            turns.append(counted.call_count)
        if turns != [4, 1]:
            raise AssertionError(f"{turns} turns of the four sequences: is the stand-in needed no more?")
        if not all(torch.equal(theirs, ours) for theirs, ours in zip(*found, strict=True)):
            raise AssertionError(f"rank {rank} of {size}: the rotated rows differ")


def pass_states_along_rows(name: str | None) -> None:
    """The delta rule and its convolution over a packed row, as over each of its sequences alone."""
    standins.install(leave_out=(name,) if name else ())
    from megatron.core.ssm.gated_delta_net import common, gdn

    bounds, heads, dim, width = torch.tensor([0, 4, 70, 73], dtype=torch.int32), 2, 6, 3
    query, key, value = (torch.randn(1, 73, heads, dim) for _ in range(3))
    states = {"g": -torch.rand(1, 73, heads), "beta": torch.rand(1, 73, heads)}
    key = torch.nn.functional.normalize(key, dim=-1)
    row, weight = torch.randn(1, 73, 5), torch.randn(5, width)
    packed, _ = gdn.chunk_gated_delta_rule(query, key, value, **states, cu_seqlens=bounds)
    convolved, _ = gdn.causal_conv1d(row, weight, None, activation="silu", cu_seqlens=bounds)
    for begin, end in itertools.pairwise(bounds.tolist()):
        of_one = (x[:, begin:end] for x in (query, key, value, *states.values()))
        alone, _ = common.torch_chunk_gated_delta_rule(*of_one)
        torch.testing.assert_close(packed[:, begin:end], alone)
        padded = torch.nn.functional.pad(row[:, begin:end].mT, (width - 1, 0))
        expected = torch.nn.functional.silu(torch.conv1d(padded, weight[:, None], groups=5)).mT
        torch.testing.assert_close(convolved[:, begin:end], expected)


def import_before_core() -> None:
    """The bridge with its stand-in, before megatron-core has found that there is no Transformer Engine."""
    with mock.patch.object(bridge_import, "CORE_MODULES", ()):
        bridge_import.import_bridge()


def import_without_engine() -> None:
    importlib.import_module("megatron.bridge")


def trials(models: Path) -> dict[str, str]:
    outcomes: dict[str, str] = {}

    def trial(name: str, action: Callable[[], object], ranks: int = 1) -> None:
        begin = time.monotonic()
        outcomes[name] = in_children(action, ranks)
        print(f"{name}: {time.monotonic() - begin:.1f} s, {outcomes[name][:200]!r}", flush=True)

    trial("core modules first", import_before_core)
    for name in bridge_import.CORE_MODULES:
        importlib.import_module(name)
    trial("transformer_engine", import_without_engine)
    bridge_import.import_bridge()
    importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    moe, latent = models / "qwen3moe", models / "deepseek"
    model_for = dict.fromkeys(standins.STAND_INS, moe) | dict.fromkeys(LATENT, latent)
    trial("nothing left out", lambda: train_without(None, moe, {}))
    trial("nothing left out, latent attention", lambda: train_without(None, latent, {}))
    for name, layout in TWO_RANKS.items():
        action = functools.partial(train_without, None, model_for[name], layout)
        trial(f"nothing left out, as for {name}", action, 2)
    trial("nothing left out, unequal parts", lambda: exchange_unequal_parts(None), 2)
    trial("rotate_at_once", rotate_packed_rows)
    trial("nothing left out, as for delta_net_kernels", lambda: pass_states_along_rows(None))
    trial("delta_net_kernels", lambda: pass_states_along_rows("delta_net_kernels"))
    trial("uneven_collectives", lambda: exchange_unequal_parts("uneven_collectives"), 2)
    for name in standins.STAND_INS.keys() - outcomes.keys():
        layout = TWO_RANKS.get(name, {})
        action = functools.partial(train_without, name, model_for[name], layout)
        trial(name, action, 2 if layout else 1)
    return outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[2]).write_text(json.dumps(trials(Path(sys.argv[1]))))
