"""What the tests of weight sync run on actor ranks: see tests/actor/launch.py."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.actor.actor import Actor
from megatron_pmd.actor.parallel import initialize
from megatron_pmd.distributed import Control
from megatron_pmd.errors import EngineError
from megatron_pmd.observe.subphases import SubphaseClock
from megatron_pmd.weight_sync import loader
from megatron_pmd.weight_sync import shards as export_module
from megatron_pmd.weight_sync.bucket import Bucket
from megatron_pmd.weight_sync.device_bucket import DeviceBucket
from megatron_pmd.weight_sync.loader import read_bucket
from megatron_pmd.weight_sync.push import PushReport, WeightPush
from megatron_pmd.weight_sync.shards import ShardExport
from megatron_pmd.weight_sync.transport import ReadBy
from tests.actor.tiny_models import config_for


class Recorder:
    """A transport to nowhere: keeps a copy of what an engine on this node would be given."""

    read_by: ReadBy = "engines"

    def __init__(self, records: bool) -> None:
        self.records, self.calls = records, list[Any]()
        self.tensors: dict[str, torch.Tensor] = {}
        self.descriptions: list[dict[str, Any]] = []
        self.fails_at = -1

    def begin(self) -> None:
        self.calls.append("begin")
        self.tensors, self.descriptions = {}, []

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        if not self.records:
            return
        [description] = descriptions
        self.descriptions.append(description)
        if len(self.descriptions) == self.fails_at:
            raise EngineError("engine 7 refused the weights")
        for name, tensor in read_bucket(description):
            assert name not in self.tensors
            self.tensors[name] = tensor.clone()

    def end(self, version: int) -> None:
        self.calls.append(version)

    def close(self) -> None: ...


def start(path: Path, layout: dict[str, int], nodes: int, precision: str) -> tuple[Actor, Control]:
    config = config_for(path, layout, precision=precision)
    if not torch.distributed.is_initialized():
        initialize(config.layout, seed=0, timeout_seconds=60)
    control = Control(60)
    control.node = control.rank * nodes // control.world
    return Actor(config, control), control


def export(
    path: Path,
    layout: dict[str, int],
    bucket_bytes: int,
    key: str,
    fp8_path: Path,
    nodes: int = 1,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Both exports of the loaded weights and of changed ones, what memory it took, and a refused bucket."""
    actor, control = start(path, layout, nodes, precision)
    recorder = Recorder(records=control.rank % (control.world // nodes) == 0)
    push = WeightPush(recorder, control, key, SubphaseClock(), bucket_bytes=bucket_bytes, timeout_seconds=60)
    shards = shards_of(actor, control)
    result: dict[str, Any] = {"node": control.node, "records": recorder.records}
    result["irregular"] = len(shards.irregular)
    result["first"] = (_bridge(actor), _pushed(push, recorder, shards, 1, result))
    with torch.no_grad():
        for parameter in (p for chunk in actor.chunks for p in chunk.parameters()):
            parameter.mul_(1.5)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    before = _status("VmRSS")
    gathers, all_gather = list[Any](), control.all_gather

    def counted(value: Any) -> list[Any]:
        gathers.append(value)
        return all_gather(value)

    control.all_gather = counted  # type: ignore[method-assign]
    pushed = _pushed(push, recorder, shards, 2, result)
    control.all_gather = all_gather  # type: ignore[method-assign]
    result["gathers"] = len(gathers)
    result["grew"] = _status("VmHWM") - before
    result["second"] = (_bridge(actor), pushed)
    first = control.node * control.world // nodes
    result["files"] = {p.name: p.stat().st_size for p in Path("/dev/shm").glob(f"*{key}-{first}-*")}
    recorder.fails_at = 2
    try:
        push.push(shards, 3, serves=[control.rank] if recorder.records else [])
    except EngineError as error:
        result["refused"] = str(error)
    result["calls"] = recorder.calls
    push.close()
    result["fp8"] = _fp8(fp8_path, layout, control, recorder.records, key)
    result["regions"] = shards.regions
    result["of the ranks' own engines"], result["for engines elsewhere"] = (
        _to_engines_of_two(shards, control, bucket_bytes, key, read_by) for read_by in ("engines", "senders")
    )
    result["on devices"] = _on_devices(shards, control, recorder.records, bucket_bytes, key)
    result["all irregular"] = _all_irregular(actor, control, recorder.records, bucket_bytes, key)
    return result


def _fp8(path: Path, layout: dict[str, int], control: Control, records: bool, key: str) -> dict[str, Any]:
    """The bridge's tensors, those pushed in FP8, and what was quantised where."""
    actor = Actor(config_for(path, layout), control)
    plain = shards_of(actor, control).regions
    shards = ShardExport(actor.bridge, actor.chunks, control, actor.shapes, fp8=True)
    recorder = Recorder(records)
    push = WeightPush(recorder, control, key, SubphaseClock(), bucket_bytes=2**19, timeout_seconds=60)
    quantize, sizes = export_module.quantize, list[int]()

    def counted(weight: torch.Tensor) -> Any:
        sizes.append(weight.numel())
        return quantize(weight)

    export_module.quantize = counted
    push.push(shards, 1, serves=[control.rank] if records else [])
    export_module.quantize = quantize
    push.close()
    return {
        "bridge": _bridge(actor), "pushed": recorder.tensors, "plain regions": plain,
        "own": [region for region in shards.shards if region.dtype == "float8_e4m3fn"],
        "irregular": len(shards.irregular), "quantised": sum(sizes),
    }  # fmt: skip


class OwnBuckets(Recorder):
    """Keeps what is in this rank's own bucket; a leader, what each rank of its engine is told."""

    def __init__(self, read_by: ReadBy) -> None:
        super().__init__(records=True)
        self.read_by = read_by
        self.told: list[list[dict[str, Any]]] = []

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        assert bucket is not None
        for name, entry in bucket.layout.entries.items():
            self.tensors[name] = bucket.tensor(entry).clone()
        self.told.append(list(descriptions))


def _to_engines_of_two(
    shards: ShardExport, control: Control, bucket_bytes: int, key: str, read_by: ReadBy
) -> dict[str, Any]:
    """Two engines of two ranks, the experts over both, with a bucket on each rank's own device: the CPU.

    Or the two ranks send to an engine elsewhere, which has its experts over two ranks.
    """
    recorder = OwnBuckets(read_by)
    push = WeightPush(
        recorder,
        control,
        key,
        SubphaseClock(),
        bucket_bytes=bucket_bytes,
        timeout_seconds=60,
        on_device=True,
        expert_parallel=2,
    )
    handle = DeviceBucket.handle
    DeviceBucket.handle = lambda bucket: [bucket.key]  # type: ignore[assignment, method-assign]
    push.push(shards, 7, serves=[control.rank, control.rank + 1] if control.rank % 2 == 0 else [])
    DeviceBucket.handle = handle  # type: ignore[method-assign]
    push.close()
    return {"tensors": recorder.tensors, "told": recorder.told}


def _on_devices(
    shards: ShardExport, control: Control, records: bool, bucket_bytes: int, key: str
) -> dict[str, Any]:
    """What arrives through a bucket on each rank's own device, here the CPU, after a refused update.

    The handles are CUDA's: here the rank's own process looks its bucket up.
    """
    recorder = Recorder(records)
    push = WeightPush(
        recorder, control, key, SubphaseClock(), bucket_bytes=bucket_bytes, timeout_seconds=60, on_device=True
    )
    opened: list[int] = []

    def handle(bucket: DeviceBucket) -> list[Any]:
        return [id(bucket.data)]

    def open_handle(handle: list[Any], nbytes: int) -> torch.Tensor:
        opened.append(handle[0])
        return next(bucket.data for bucket in push._buckets if id(bucket.data) == handle[0])

    DeviceBucket.handle = handle  # type: ignore[assignment, method-assign]
    loader.open_handle = open_handle
    serves = [control.rank] if records else []
    recorder.fails_at = 3
    with contextlib.suppress(EngineError):
        push.push(shards, 5, serves=serves)
    kept = [bucket.data.numel() for bucket in push._buckets]
    recorder.fails_at = -1
    push.push(shards, 6, serves=serves)
    ends = [description["ends"] for description in recorder.descriptions]
    left = len(push._buckets)
    push.close()
    return {"tensors": recorder.tensors, "opened": opened, "kept": kept, "ends": ends, "left": left}


def _all_irregular(
    actor: Actor, control: Control, records: bool, bucket_bytes: int, key: str
) -> dict[str, torch.Tensor]:
    """As for a family whose tensors are more than cut-up parameters."""
    only_renames = export_module._only_renames
    export_module._only_renames = lambda bridge: False
    shards = shards_of(actor, control)
    export_module._only_renames = only_renames
    assert not shards.shards
    recorder = Recorder(records)
    push = WeightPush(recorder, control, key, SubphaseClock(), bucket_bytes=bucket_bytes, timeout_seconds=60)
    push.push(shards, 4, serves=[control.rank] if records else [])
    push.close()
    return recorder.tensors


def _pushed(
    push: WeightPush, recorder: Recorder, shards: ShardExport, version: int, result: dict[str, Any]
) -> dict[str, torch.Tensor]:
    serves = [torch.distributed.get_rank()] if recorder.records else []
    report: PushReport = push.push(shards, version, serves=serves)
    result["report"] = (report.tensors, report.bytes, report.buckets)
    if recorder.records:
        result["manifest"] = recorder.descriptions[-1]["update"]["manifest"]
        result["positions"] = ["manifest" in d["update"] for d in recorder.descriptions]
    return dict(recorder.tensors)


def shards_of(actor: Actor, control: Control) -> ShardExport:
    return ShardExport(actor.bridge, actor.chunks, control, actor.shapes)


def _bridge(actor: Actor) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in actor.export()}


def _status(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
