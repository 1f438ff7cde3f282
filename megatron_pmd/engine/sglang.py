"""SGLang engines and the router in front of them, as child processes."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_pmd.config import Model, Rollout
from megatron_pmd.engine.server import LOOPBACK, ServerProcess, free_port, inherited_environment
from megatron_pmd.engine.server_args import check_options, server_options
from megatron_pmd.errors import ConfigError
from megatron_pmd.fp8 import names_in, quantization_config
from megatron_pmd.stubs import stub_path

__all__ = ["EngineProcess", "EngineSpec", "RouterProcess", "RouterSpec", "free_port"]

LOADER = "megatron_pmd.weight_sync.loader.load_bucket"
NO_WEIGHTS = "none"
"""Weight version of an engine that the actor has sent nothing to yet."""

ROUTER_MARGIN_SECONDS = 60

# SGLang option -> the setting it follows. Naming one in rollout.sglang is an error.
OUR_OPTIONS = {
    "model_path": "model.path",
    "dtype": "model.precision",
    "trust_remote_code": "model.trust_remote_code",
    "tp_size": "rollout.tensor_parallel",
    "max_running_requests": "rollout.max_running_requests",
    "max_total_tokens": "rollout.max_total_tokens",
    "random_seed": "seed",
    "host": "this program",
    "port": "this program",
    "api_key": "this program",
    "admin_api_key": "this program",
    "device": "this program",
    "base_gpu_id": "this program",
    "nnodes": "rollout.tensor_parallel (and where its ranks are)",
    "node_rank": "this program",
    "dist_init_addr": "this program",
    "skip_tokenizer_init": "this program (only token ids go in and out)",
    "load_format": "this program (the actor sends the weights)",
    "weight_version": "this program",
    "custom_weight_loader": "this program",
    "enable_memory_saver": "this program",
    "enable_return_routed_experts": "actor.experts.replay_routing",
    "json_model_override_args": "this program (rollout.fp8)",
}


@dataclass(frozen=True)
class EngineSpec:
    """All that one engine, or its part on one node, needs to know; pure data, so it can be started again."""

    number: int
    """Counts the engines of a run from 0."""
    model: Model
    rollout: Rollout
    port: int
    log: Path | None
    """Appended to; the options the engine was started with are written beside it, as `<log>.yaml`. None: a
    server that others started keeps its own."""
    seed: int
    cpu: bool
    host: str = LOOPBACK
    """Address to listen on; one the driver's node can reach."""
    api_key: str | None = None
    """Requests to generate must then carry `Authorization: Bearer <api_key>`."""
    admin_key: str | None = None
    """Calls that change weights or memory, or abort, must then carry this one: the update endpoint unpickles
    what it is sent, and the router, which has the other key, needs none of them."""
    first_gpu: int = 0
    """The first of its devices on this node, counted among the visible ones."""
    nodes: int = 1
    """Over how many nodes the engine reaches: equal parts of tensor_parallel, one server process on each."""
    node: int = 0
    """Which of them this part is on; the first one's process takes the requests for all."""
    rendezvous: str | None = None
    """host:port at which the parts of several nodes find each other; on the first one's node."""
    record_routing: bool = False
    """Every answer says which experts each token went to (plugins/)."""
    load_model_weights: bool = False
    """Read the weights in model.path; False: the actor sends them before the first use."""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def engine_options(spec: EngineSpec) -> dict[str, Any]:
    """The engine's ServerArgs by field name; ConfigError for an option that does not exist or is not free."""
    check_options(spec.rollout.sglang, OUR_OPTIONS)
    options: dict[str, Any] = {
        "model_path": spec.model.path,
        "trust_remote_code": spec.model.trust_remote_code,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[spec.model.precision],
        "host": spec.host,
        "port": spec.port,
        "tp_size": spec.rollout.tensor_parallel,
        "max_running_requests": spec.rollout.max_running_requests,
        "random_seed": spec.seed,
        "skip_tokenizer_init": True,
        "load_format": "auto" if spec.load_model_weights else "dummy",
        "weight_version": NO_WEIGHTS,
        "custom_weight_loader": [LOADER],
        "log_level": "warning",
    }
    if spec.nodes > 1:
        options |= {"nnodes": spec.nodes, "node_rank": spec.node, "dist_init_addr": spec.rendezvous}
    if spec.api_key is not None:
        options["api_key"] = spec.api_key
    if spec.record_routing:
        options["enable_return_routed_experts"] = True
    if spec.admin_key is not None:
        options["admin_api_key"] = spec.admin_key
    if spec.rollout.max_total_tokens is not None:
        options["max_total_tokens"] = spec.rollout.max_total_tokens
    if spec.rollout.fp8:
        options["json_model_override_args"] = json.dumps({"quantization_config": _fp8_config(spec)})
    options |= (
        _cpu_options(spec) if spec.cpu else {"base_gpu_id": spec.first_gpu, "enable_memory_saver": True}
    )
    return options | spec.rollout.sglang


def _fp8_config(spec: EngineSpec) -> dict[str, Any]:
    if spec.cpu:
        raise ConfigError("rollout.fp8 needs CUDA: SGLang has no FP8 matrices on a CPU")
    return quantization_config(names_in(Path(spec.model.path)))


def _cpu_options(spec: EngineSpec) -> dict[str, Any]:
    if spec.rollout.max_total_tokens is None:
        raise ConfigError(
            "rollout.max_total_tokens must be set on a CPU: SGLang would give the KV cache all free memory"
        )
    return {
        "device": "cpu",
        "attention_backend": "torch_native",  # the others need CUDA, or the AMX build of sgl-kernel
        "cuda_graph_backend_decode": "disabled",
        "cuda_graph_backend_prefill": "disabled",
        "disable_overlap_schedule": True,
        "sleep_on_idle": True,  # an idle scheduler otherwise takes half a core from the actors
        "chunked_prefill_size": 2048,
    }


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """The engine's environment: this process's, less torchrun's variables, plus what a CPU engine needs."""
    environment = inherited_environment([spec.host])
    # The router keeps connections over a whole training phase. uvicorn closes them after 5 s: the first
    # requests of the next rollout meet the closing ones, fail, and ten failures close the engine to all
    # requests.
    environment["SGLANG_TIMEOUT_KEEP_ALIVE"] = "86400"
    environment["SGLANG_HEALTH_CHECK_TIMEOUT"] = str(math.ceil(spec.rollout.health_timeout_seconds))
    # With it on, every health check generates a token; on released memory that is a crash.
    environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    if spec.nodes > 1 and spec.rendezvous:
        # SGLang's ranks talk to each other on the first interface it finds; it shall be the job's
        environment["SGLANG_HOST_IP"] = spec.host if spec.node else spec.rendezvous.rpartition(":")[0]
    # The loader runs inside the engine, where this package need not be installed.
    path = [str(Path(__file__).parents[2])]
    if spec.record_routing:
        path.append(str(Path(__file__).parent / "plugins"))
    if spec.cpu:
        path.insert(0, str(stub_path()))
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["OMP_NUM_THREADS"] = str(spec.rollout.threads_per_engine)
        if spec.rollout.tensor_parallel > 1:
            # SGLang else refuses more ranks than the machine has NUMA nodes; here they share its cores
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([cores] * spec.rollout.tensor_parallel)
            # tensor-parallel embeddings are compiled, by a compiler that is not there
            environment["TORCHDYNAMO_DISABLE"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(path + [p for p in [environment.get("PYTHONPATH")] if p])
    return environment


class EngineProcess(ServerProcess):
    """One SGLang server, or the part of one that is on this node.

    When this process dies, however it dies, the server and its children die with it.
    """

    def __init__(self, spec: EngineSpec) -> None:
        """Starts the engine and returns at once; ConfigError for a wrong option, before any start."""
        options = engine_options(spec)
        assert spec.log is not None, "an engine of ours has a log"
        self.spec = spec
        arguments = spec.log.with_name(spec.log.name + ".yaml")
        # SGLang's --config wants YAML, and JSON is YAML.
        _write_private(arguments, {server_options()[name]: value for name, value in options.items()})
        command = [sys.executable, "-W", "ignore", "-m", "sglang.launch_server", "--config", str(arguments)]
        name = f"engine {spec.number}" + (f", node {spec.node} of {spec.nodes}" if spec.nodes > 1 else "")
        super().__init__(name, command, engine_environment(spec), spec.url, "/ready", spec.log)


def _write_private(path: Path, arguments: Any) -> None:
    """Write arguments as JSON, for this user only: from a command line, every user could read the API key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # an old file would keep its old mode
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(arguments, file, indent=1)


@dataclass(frozen=True)
class RouterSpec:
    engines: Sequence[str]
    """Base URL of every engine; they must be ready before the router starts."""
    port: int
    log: Path
    request_timeout_seconds: float
    """The clients' own deadline; the router's is a minute longer."""
    host: str = LOOPBACK
    api_key: str | None = None
    """The engines' key."""
    policy: str = "round_robin"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


START_ROUTER = """
import json, sys
from sglang_router.launch_router import launch_router, parse_router_args
launch_router(parse_router_args(json.load(open(sys.argv[1]))))
"""
"""As `python -m sglang_router.launch_router`, which can be told its API key only on the command line."""


class RouterProcess(ServerProcess):
    """The sglang router in front of all engines; when an engine is started again, so is the router."""

    def __init__(self, spec: RouterSpec) -> None:
        """Starts the router and returns at once."""
        self.spec = spec
        options: dict[str, Any] = {
            "host": spec.host,
            "port": spec.port,
            "policy": spec.policy,
            # Of `manual` alone: a conversation's first request goes where the fewest are in flight.
            "assignment-mode": "min_load",
            # The client gives up first: ten requests that time out *here* close the engine to all others.
            "request-timeout-secs": int(spec.request_timeout_seconds) + ROUTER_MARGIN_SECONDS,
            # A dead engine is closed to requests after 10 of them failed (they are retried elsewhere), or two
            # checks.
            "cb-timeout-duration-secs": 10,
            "health-check-interval-secs": 5,
            # An engine with a thousand new requests may take 5 s to say it is well.
            "health-check-timeout-secs": 20,
            "health-failure-threshold": 2,
            "health-success-threshold": 1,
            "worker-startup-check-interval": 1,
            # Its default, port 29000 on all interfaces, collides with a second run on the node.
            "prometheus-host": LOOPBACK,
            "prometheus-port": free_port(),
            "log-level": "warn",
        }
        if spec.api_key is not None:
            options["api-key"] = spec.api_key
        arguments = ["--worker-urls", *spec.engines]
        arguments += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        file = spec.log.with_name(spec.log.name + ".json")
        _write_private(file, arguments)
        command = [sys.executable, "-c", START_ROUTER, str(file)]
        hosts = [host for url in spec.engines if (host := urlsplit(url).hostname)]
        super().__init__("router", command, inherited_environment(hosts), spec.url, "/readiness", spec.log)
