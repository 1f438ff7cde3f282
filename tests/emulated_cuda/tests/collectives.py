"""A rank of tests/test_nccl.py: every collective of torch.distributed, compared with what it has to give."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist


def of_rank(rank: int, size: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(size, device="cuda") + 10 * rank).to(dtype)


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.dtype != expected.dtype or not torch.equal(found, expected):
        raise SystemExit(f"{name}: {found.tolist()} in the place of {expected.tolist()}")


def reductions(rank: int, ranks: int) -> None:
    everything = torch.stack([of_rank(r) for r in range(ranks)])
    for op, expected in (
        (dist.ReduceOp.SUM, everything.sum(0)),
        (dist.ReduceOp.MAX, everything.amax(0)),
        (dist.ReduceOp.MIN, everything.amin(0)),
        (dist.ReduceOp.AVG, everything.mean(0)),
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            found = of_rank(rank, dtype=dtype)
            dist.all_reduce(found, op)
            check(f"all_reduce {op} {dtype}", found, expected.to(dtype))
    counts = torch.full((2,), rank + 1, device="cuda", dtype=torch.int64)
    dist.all_reduce(counts)
    check("all_reduce of integers", counts, torch.full_like(counts, ranks * (ranks + 1) // 2))
    share = torch.empty(2 * ranks // ranks, device="cuda")
    dist.reduce_scatter_tensor(share, of_rank(rank, 2 * ranks))
    whole = torch.stack([of_rank(r, 2 * ranks) for r in range(ranks)]).sum(0)
    check("reduce_scatter_tensor", share, whole[2 * rank : 2 * rank + 2])
    to_first = of_rank(rank)
    dist.reduce(to_first, dst=0)
    if rank == 0:
        check("reduce", to_first, everything.sum(0))


def movements(rank: int, ranks: int) -> None:
    gathered = torch.empty(6 * ranks, device="cuda", dtype=torch.bfloat16)
    dist.all_gather_into_tensor(gathered, of_rank(rank, dtype=torch.bfloat16))
    check("all_gather", gathered, torch.cat([of_rank(r, dtype=torch.bfloat16) for r in range(ranks)]))
    sent = of_rank(rank)
    dist.broadcast(sent, src=1)
    check("broadcast", sent, of_rank(1))
    # rank r has r + 1 rows for everybody
    rows = torch.full((ranks * (rank + 1),), float(rank), device="cuda")
    sizes = list(range(1, ranks + 1))
    received = torch.empty(sum(sizes), device="cuda")
    dist.all_to_all_single(received, rows, sizes, [rank + 1] * ranks)
    check(
        "all_to_all",
        received,
        torch.cat([torch.full((r + 1,), float(r), device="cuda") for r in range(ranks)]),
    )
    following, previous = (rank + 1) % ranks, (rank - 1) % ranks
    got = torch.empty(6, device="cuda")
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, of_rank(rank), following), dist.P2POp(dist.irecv, got, previous)]
    ):
        work.wait()
    check("a ring of sends", got, of_rank(previous))
    codes = of_rank(rank, dtype=torch.float8_e4m3fn).view(torch.uint8)
    everywhere = torch.empty(6 * ranks, device="cuda", dtype=torch.uint8)
    dist.all_gather_into_tensor(everywhere, codes)
    check("FP8 codes", everywhere[:6], of_rank(0, dtype=torch.float8_e4m3fn).view(torch.uint8))


def subgroups(rank: int, ranks: int) -> None:
    groups = [dist.new_group([r for r in range(ranks) if r % 2 == parity]) for parity in range(2)]
    found = of_rank(rank)
    dist.all_reduce(found, group=groups[rank % 2])  # type: ignore[arg-type]
    check("all_reduce in a subgroup", found, sum(of_rank(r) for r in range(rank % 2, ranks, 2)))  # type: ignore[arg-type]


def main(what: str) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    if what == "dies" and rank == 1:
        os._exit(3)
    if what == "dies":
        try:
            dist.all_reduce(of_rank(rank))
        except dist.DistBackendError as error:
            print(f"rank {rank} saw: {error}")
            sys.stdout.flush()
            os._exit(0)
        raise SystemExit("nobody noticed")
    reductions(rank, ranks)
    movements(rank, ranks)
    subgroups(rank, ranks)
    dist.barrier()
    print(f"rank {rank}: done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
