"""Control of one engine over HTTP: memory, weights, version. Every call has a deadline.

The order in one iteration, of which nothing here is optional on a GPU:
    release(["kv_cache"]), release(["weights"])            the engine is idle; its memory goes to the actor
    resume(["weights"]), begin_update(), load_bucket(...) for each bucket, end_update(version)
    resume(["kv_cache"]), flush_cache()                    now it may be sent requests again
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx
import torch

from megatron_pmd.config import PauseMode
from megatron_pmd.engine.server import CONNECT_SECONDS, tail
from megatron_pmd.engine.sglang_server import LOADER, NO_WEIGHTS, EngineSpec
from megatron_pmd.errors import EngineError, StaleWeights
from megatron_pmd.waiting import waiting_for

Tag = Literal["weights", "kv_cache"]
READING = ("/model_info", "/server_info", "/health", "/health_generate")
"""Endpoints that only tell."""


def pickled_by_value(value: Any) -> bytes:
    """A pickle that SGLang's SafeUnpickler (srt/utils/common.py) reads, also of tensors.

    By value: torch's own way of sharing between processes lets only related processes read it. megatron-core
    (core/__init__.py) puts a function of its own in the place of torch.storage._load_from_bytes, which a
    pickled tensor names; the unpickler knows torch's name alone.
    """
    load: Any = torch.storage._load_from_bytes
    own = load.__module__, load.__qualname__
    load.__module__, load.__qualname__ = "torch.storage", "_load_from_bytes"
    try:
        return pickle.dumps(value)
    finally:
        load.__module__, load.__qualname__ = own


class EngineControl:
    """The only caller of one engine's control endpoints: its leader's. Calls must not overlap in time."""

    def __init__(self, spec: EngineSpec, timeout_seconds: float) -> None:
        """timeout_seconds: deadline of each call."""
        self.spec = spec
        self.timeout_seconds = timeout_seconds
        self._client = httpx.Client(
            base_url=spec.url, trust_env=False,
            timeout=httpx.Timeout(timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds)),
        )  # fmt: skip

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def release(self, tags: Sequence[Tag]) -> None:
        """Free the engine's memory of these kinds, which must be resident; waits until the engine is idle."""
        if "kv_cache" in tags:
            # Right after its last answer the scheduler still holds the batch, and dies of an assertion if it
            # is told to release then (SGLang, scheduler.py: is_fully_idle). A flush waits until it is idle.
            self.flush_cache()
        self._call("POST", "/release_memory_occupation", {"tags": list(tags)})

    def resume(self, tags: Sequence[Tag]) -> None:
        """Take the memory back. Its contents are undefined: load the weights, flush the cache."""
        self._call("POST", "/resume_memory_occupation", {"tags": list(tags)})

    def pause(self, mode: PauseMode) -> None:
        """Stop generating, also for an update; requests wait, with what is computed of them, as SGLang says.

        `retract`: they lose all but their tokens, and go_on() has their KV cache computed again, under the
        weights that the engine then has. `in_place`: they keep it, and flush_cache() is refused.
        """
        self._call("POST", "/pause_generation", {"mode": mode})

    def go_on(self) -> None:
        """Generate again after a pause; of an engine that generates, nothing changes."""
        self._call("POST", "/continue_generation", {})

    def begin_update(self) -> None:
        """Open a weight update; SGLang refuses buckets outside of one. Until end_update there is no version.

        An update that a failure left open is closed first, so that an engine which refused a bucket can be
        tried again.
        """
        self.withdraw_version()
        begun = self._call("POST", "/begin_weight_update", {}, accept=(200, 400))
        if not begun.json().get("success"):  # an earlier update is still open
            self._confirmed("/end_weight_update", {})
            self._confirmed("/begin_weight_update", {})

    def load_bucket(self, descriptions: Sequence[dict[str, Any]]) -> None:
        """Have every rank of the engine load its bucket; returns when all of them are done reading.

        descriptions: by rank of the engine, see Bucket.describe.
        EngineError with the loader's own words if a rank refused it or failed; the engine stays up.
        """
        # engines of one node may be told of the same bucket
        reply = Path(f"{descriptions[0]['reply']}-{self.spec.port}.json")
        reply.unlink(missing_ok=True)
        said = [json.dumps(description | {"reply": str(reply)}).encode() for description in descriptions]
        bodies = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in said]
        payloads = [base64.b64encode(pickled_by_value([("bucket", body)])).decode() for body in bodies]
        request = {
            "serialized_named_tensors": payloads,
            "load_format": LOADER,
            "flush_cache": False,  # a flush that fails here is an assertion that kills the engine
        }
        self._confirmed("/update_weights_from_tensor", request)
        self._check_reply(reply, descriptions[0])

    def _check_reply(self, reply: Path, description: dict[str, Any]) -> None:
        try:
            answer = json.loads(reply.read_text())
            reply.unlink()
        except FileNotFoundError:
            answer = {"bucket": None}
        if answer["bucket"] != description["bucket"]:
            raise EngineError(
                f"{self._where()} gave no reply to weight bucket {description['bucket']} "
                f"(expected in {reply}); does the engine share /dev/shm with this process?"
            )
        for rank, failure in enumerate(answer["failures"]):
            if failure:
                raise EngineError(f"{self._where()}: rank {rank} refused the weights: {failure}")

    def join_group(self, host: str, port: int, name: str, *, rank_offset: int, world: int) -> None:
        """Join the leader's process group; returns when all its members have."""
        backend = "gloo" if self.spec.cpu else "nccl"
        group = {"master_address": host, "master_port": port, "group_name": name, "backend": backend}
        self._confirmed(
            "/init_weights_update_group", group | {"rank_offset": rank_offset, "world_size": world}
        )

    def leave_group(self, name: str) -> None:
        """Forget a group; one that the engine does not know of is none to leave."""
        self._call("POST", "/destroy_weights_update_group", {"group_name": name}, accept=(200, 400))

    def load_broadcast(self, tensors: Sequence[tuple[str, str, Sequence[int]]], group: str) -> None:
        """Have every rank of the engine take one message from the group's rank 0.

        tensors: name, dtype and shape of each; they lie in the message one behind the other, without gaps.
        """
        names, dtypes, shapes = zip(*tensors, strict=True)
        request = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": group}
        self._confirmed(
            "/update_weights_from_distributed",
            request | {"load_format": "flattened_bucket", "flush_cache": False},
        )

    def tensor_parallel(self) -> int:
        """How many ranks the engine has, as itself says."""
        return int(self._call("GET", "/server_info").json()["tp_size"])

    def load_from_disk(self, folder: Path) -> None:
        """Have the engine read a folder of safetensors; no update may be open."""
        # otherwise it reads in the way it was started with: not at all
        request = {"model_path": str(folder), "load_format": "auto", "flush_cache": False}
        self._confirmed("/update_weights_from_disk", request)

    def end_update(self, version: int) -> None:
        """Close the weight update; the engine now serves this version. StaleWeights if it says otherwise."""
        self._confirmed("/end_weight_update", {})
        self.confirm(version)

    def withdraw_version(self) -> None:
        """Between two versions the engine holds a mixture, and must not serve it as either."""
        self._set_version(NO_WEIGHTS)

    def confirm(self, version: int) -> None:
        """Tell the engine what it serves now; StaleWeights if it says otherwise."""
        self._set_version(str(version))
        served = self.weight_version()
        if served != version:
            raise StaleWeights(
                f"{self._where()} serves weight version {served}, expected {version}; {self._log()}"
            )

    def flush_cache(self, *, paused: bool = False) -> None:
        """Forget every cached prefix: it was computed with earlier weights.

        paused: requests wait, and hold nothing of the cache. SGLang then flushes at once, or never: one that
        it puts off waits until there are none (scheduler_components/flush_wrapper.py).
        """
        self._call("POST", "/flush_cache", {}, query={"timeout": 0.0 if paused else self.timeout_seconds})

    def weight_version(self) -> int | None:
        """The version served; None before the first completed update, and from begin_update to end_update."""
        version = self._call("GET", "/model_info").json()["weight_version"]
        return int(version) if version.isdecimal() else None

    def responds(self, seconds: float) -> bool:
        """Whether the scheduler, too, answers within this time; touches no memory that may be released."""
        return self._answers("/server_info", seconds)

    def generates(self, seconds: float) -> bool:
        """Whether the engine produces a token within this time, or is producing some.

        Only while weights and KV cache are resident: on released memory it is a crash.
        """
        return self._answers("/health_generate", seconds)

    def _answers(self, path: str, seconds: float) -> bool:
        try:
            patience = httpx.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
            return self._client.get(path, headers=self._headers(path), timeout=patience).status_code == 200
        except httpx.HTTPError:
            return False

    def _headers(self, path: str) -> dict[str, str]:
        """SGLang takes the admin key for what changes an engine, and only the other one for the rest."""
        return self.spec.keys.headers if path in READING else self.spec.keys.admin_headers

    def _set_version(self, version: str) -> None:
        self._confirmed("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def _confirmed(self, path: str, body: dict[str, Any]) -> None:
        answer = self._call("POST", path, body).json()
        if not answer.get("success"):
            raise EngineError(f"{self._where()} refused {path}: {answer.get('message')}")

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        query: dict[str, Any] | None = None,
        accept: Sequence[int] = (200,),
    ) -> httpx.Response:
        try:
            with waiting_for(f"{self._where()} to answer {path}", self.timeout_seconds):
                response = self._client.request(
                    method, path, json=body, params=query, headers=self._headers(path)
                )
        except httpx.TimeoutException:
            raise EngineError(
                f"{self._where()} did not answer {path} within {self.timeout_seconds:g} s; {self._log()}"
            ) from None
        except httpx.HTTPError as error:
            raise EngineError(f"{self._where()} failed in {path}: {error}; {self._log()}") from None
        if response.status_code not in accept:
            raise EngineError(
                f"{self._where()} answered {path} with status {response.status_code}: {response.text[:500]}; "
                f"{self._log()}"
            )
        return response

    def _log(self) -> str:
        log = self.spec.log
        return f"log: {log}, which ends:\n{tail(log)}" if log else "log: the server's own"

    def _where(self) -> str:
        return f"engine {self.spec.number} ({self.spec.host}, port {self.spec.port})"
