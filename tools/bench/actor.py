"""What the actor costs beside its passes (those: tools/bench/loop.py --only update).

python -m tools.bench.actor checkpoint    # 135 M parameters in bf16, two data-parallel ranks; 2 minutes
python -m tools.bench.actor memory        # peak of the log-probabilities' allocations, by the size of a chunk
python -m tools.bench.actor packing       # occupancy of packed rows against padded batches, and balance

Prints JSON. Only the packing figures do not depend on the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pmd.config import (
    Actor,
    Batch,
    Checkpoint,
    Data,
    Layout,
    Model,
    Optimizer,
    ReasoningGymSource,
    Reward,
    RunConfig,
)

RANKS = 2
STEPS = 4
"""Timed optimizer steps without a checkpoint."""
EQUAL_COST = 13_889
"""Tokens at which attention costs as much as all else: Qwen3-30B-A3B."""


def checkpoint_run() -> dict[str, Any]:
    """Start the ranks of checkpoint_rank and return what the first measured."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={RANKS}", "-m", "tools.bench.actor", "rank", folder]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900)
        return json.loads((Path(folder) / "result.json").read_text())


def checkpoint_rank(folder: Path) -> None:
    """Optimizer steps alone, a checkpoint that training waits for, and one that it does not wait for."""
    from megatron_pmd.actor.cpu import standins

    standins.install()
    from megatron_pmd.actor.actor import Actor as Policy
    from megatron_pmd.actor.parallel import initialize
    from megatron_pmd.distributed import Control

    config = llama_135m(folder / "model")
    initialize(config.layout, seed=0, timeout_seconds=600)
    control = Control(600)
    if control.is_driver:
        make_llama(folder / "model")
    control.barrier()
    policy = Policy(config, control)
    step = steps_of(policy)
    step()
    alone = [step() for _ in range(STEPS)]

    def clocked(action: Any, *arguments: Any, **options: Any) -> float:
        control.barrier()
        begin = time.monotonic()
        action(*arguments, **options)
        control.barrier()
        return time.monotonic() - begin

    checkpoints = folder / "checkpoints"
    result: dict[str, Any] = {"step alone": float(np.median(alone))}
    begun = clocked(policy.save, checkpoints, 1, {})
    result["waited for"] = begun + clocked(policy.publish_checkpoint, wait=True)
    size = sum(file.stat().st_size for file in (checkpoints / "iteration-1").iterdir())
    result["gigabytes"], result["write and sync"] = (
        size / 1e9,
        clocked(plain_write, folder / "plain", size, control),
    )
    begin = time.monotonic()
    result["not waited for: begin"] = clocked(policy.save, checkpoints, 2, {})
    beside = []
    while not (checkpoints / "iteration-2").exists():
        beside.append(step())
        policy.publish_checkpoint(wait=False)
        control.barrier()
    result["not waited for: published after"] = time.monotonic() - begin
    result["step beside"], result["steps beside"] = float(np.median(beside)), len(beside)
    if control.is_driver:
        (folder / "result.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def plain_write(path: Path, size: int, control: Any) -> None:
    """As many bytes by one process with nothing around them."""
    if control.is_driver:
        with path.open("wb") as file:
            for _ in range(size // 2**23):
                file.write(os.urandom(2**13) * 2**10)
            os.fsync(file.fileno())
        path.unlink()


def steps_of(policy: Any) -> Any:
    """A function that takes an optimizer step on 16 random samples of 64 tokens and returns its seconds."""
    from megatron_pmd.algorithm.losses import Constants, loss_of
    from megatron_pmd.batch import RolloutBatch, Sample
    from megatron_pmd.objectives.pmd import Pmd

    rng = np.random.default_rng(0)
    samples = [
        Sample(
            group=i // 4, number=i % 4, problem=0, prompt="", response="", answer="",
            prompt_tokens=rng.integers(0, 49_000, 32),
            response_tokens=rng.integers(0, 49_000, 32), engine_log_probs=np.zeros(32),
            finish_reason="stop", weight_version=0, seed=0, advantage=float(rng.normal()), tau=0.1,
        )
        for i in range(16)
    ]  # fmt: skip
    batch = RolloutBatch.pack(samples, 1.0)
    microbatches = policy.microbatches(batch, np.arange(16))
    anchor = torch.zeros(len(batch.tokens))
    loss = loss_of(Pmd(), Constants(max_response_tokens=32))

    def step() -> float:
        begin = time.monotonic()
        policy.update(batch, microbatches, anchor, loss, 1e-6)
        return time.monotonic() - begin

    return step


def llama_135m(model: Path) -> RunConfig:
    return RunConfig(
        name="bench",
        iterations=1,
        model=Model(path=str(model), precision="bf16"),
        layout=Layout(data=RANKS),
        batch=Batch(
            prompts_per_rollout=4, samples_per_prompt=4, prompts_per_step=4, max_tokens_per_microbatch=1024,
            max_prompt_tokens=128, max_response_tokens=128,
        ),
        optimizer=Optimizer(learning_rate=1e-6),
        actor=Actor(),
        checkpoint=Checkpoint(keep=2),
        data=Data(train=ReasoningGymSource(task="chain_sum", size=3)),
        reward=Reward(name="exact"),
    )  # fmt: skip


def make_llama(folder: Path) -> None:
    """SmolLM2-135M's shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operators make while it is active, as long as they live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def memory() -> dict[str, Any]:
    """Peak beside the bf16 logits [4096, 152064 / 8] of their log-probabilities, forward and backward."""
    from megatron_pmd.actor.cpu import standins

    standins.install()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from megatron_pmd.actor.log_probs import token_log_probs
    from megatron_pmd.actor.parallel import initialize

    initialize(Layout(), seed=0, timeout_seconds=60)
    tokens, columns = 4096, 152_064 // 8
    result: dict[str, Any] = {"logits, MiB": tokens * columns * 2 / 2**20}
    for chunk in (tokens, 1024, 256):
        logits = torch.randn(tokens, columns, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(0, columns, (tokens,))
        with Allocations() as allocations:
            log_probs, _ = token_log_probs(logits, targets, temperature=1.0, chunk_tokens=chunk)
            forward = allocations.peak
            log_probs.sum().backward()
        result[f"chunks of {chunk}"] = {
            "forward, MiB": forward / 2**20,
            "with backward, MiB": allocations.peak / 2**20,
        }
    torch.distributed.destroy_process_group()
    return result


def packing() -> dict[str, Any]:
    """8,192 log-normal lengths in rows of several sizes, over replicas of one rank or of several."""
    return {
        "mean 4,000, cut at 10,000, 32 ranks": {
            "rows of 16,384": packed(log_normal(4000, 10_000), ranks=32, context=1, max_tokens=16_384)
        },
        "mean 32,768, cut at 131,072, 8 x context 8 ranks": {
            f"rows of {limit:,}": packed(log_normal(32_768, 131_072), ranks=8, context=8, max_tokens=limit)
            for limit in (133_120, 163_840, 262_144)
        },
    }


def log_normal(mean: float, longest: int) -> np.ndarray:
    """8,192 lengths whose mean was so much before they were cut; σ of their logarithm is 0.6."""
    draws = np.random.default_rng(0).lognormal(np.log(mean) - 0.18, 0.6, 8192)
    return np.clip(draws, 1, longest).astype(np.int64)


def packed(lengths: np.ndarray, *, ranks: int, context: int, max_tokens: int) -> dict[str, float]:
    """How full rows are, and how even the work of ranks, of which `context` share out each row.

    Operations of a rank: those of its tokens, and of the pairs of tokens in which it holds the later one.
    """
    from megatron_pmd.actor.batching import attention_cost_tokens, pack
    from megatron_pmd.actor.packing import Row

    rows = [Row(rank=rank, size=context) for rank in range(context)]
    padded = rows[0].padded(lengths)
    begin = time.process_time()
    shares = pack(padded, attention_cost_tokens(padded, EQUAL_COST), ranks=ranks, max_tokens=max_tokens)
    seconds = time.process_time() - begin
    work = np.zeros((ranks, context, len(shares[0])))
    for rank, share in enumerate(shares):
        for number, microbatch in enumerate(share):
            bounds = np.concatenate([[0], np.cumsum(padded[microbatch])]).astype(np.int64)
            positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], padded[microbatch])
            for row in rows:
                held = positions[row.held(bounds)] if context > 1 and microbatch else positions
                work[rank, row.rank, number] = len(held) + 2 * held.sum() / EQUAL_COST
    as_drawn = lengths.reshape(-1, 4)
    return {
        "occupancy, packed": lengths.sum() / (ranks * len(shares[0]) * max_tokens),
        "occupancy, batches of 4 padded": lengths.sum() / (as_drawn.max(1).sum() * 4),
        "busiest rank over mean": work.sum(2).max() / work.sum(2).mean(),
        "each round's busiest rank over mean": work.max((0, 1)).sum() / work.mean((0, 1)).sum(),
        "schedule, seconds": seconds,
    }


if __name__ == "__main__":
    what = sys.argv[1:]
    if what[:1] == ["rank"]:
        torch.set_num_threads(1)
        checkpoint_rank(Path(what[1]))
    elif what and what[0] in ("checkpoint", "memory", "packing"):
        parts = {"checkpoint": checkpoint_run, "memory": memory, "packing": packing}
        print(json.dumps(parts[what[0]](), indent=1))
    else:
        sys.exit(__doc__)
