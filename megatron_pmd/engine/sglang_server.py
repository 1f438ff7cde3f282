"""An SGLang engine as a child process: its options and its environment."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pmd import network
from megatron_pmd.config import Model, Rollout, RunConfig
from megatron_pmd.engine.families import check_served
from megatron_pmd.engine.first_start import ready_before
from megatron_pmd.engine.installed_options import check_options, check_parsers, server_options
from megatron_pmd.engine.keys import NO_KEYS, Keys
from megatron_pmd.engine.server import LOOPBACK, ServerProcess, inherited_environment, write_arguments
from megatron_pmd.errors import ConfigError, MissingPackage
from megatron_pmd.files import read_object
from megatron_pmd.fp8 import quantization_config
from megatron_pmd.hugging_face import TensorFiles

LOADER = "megatron_pmd.weight_sync.loader.load_bucket"
READY_PATH = "/ready"
"""Answers as soon as an engine takes requests, whatever weights it has."""
NO_WEIGHTS = "none"
"""Weight version of an engine that the actor has sent nothing to yet."""

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


MOVES_EXPERTS = {
    "enable_eplb": False, "ep_num_redundant_experts": 0, "init_expert_location": "trivial", "moe_dp_size": 1,
    "max_ep_size": None, "elastic_ep_backend": None,
}  # fmt: skip
"""SGLang options, and the value with which an engine's ranks hold equal shares of the experts, in order."""


@dataclass(frozen=True)
class NodeSpan:
    """Over which nodes an engine reaches, and which of them one of its server processes is on."""

    nodes: int = 1
    """Equal parts of tensor_parallel, one server process on each."""
    node: int = 0
    """Of these, from 0; the first one's process takes the requests for all."""
    rendezvous: str | None = None
    """host:port at which the processes of several nodes find each other; on the first one's node."""


ONE_NODE = NodeSpan()


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
    keys: Keys = NO_KEYS
    """What calls to it have to carry."""
    first_gpu: int = 0
    """The first of its devices on this node, counted among the visible ones."""
    span: NodeSpan = ONE_NODE
    record_routing: bool = False
    """Every answer says which experts each token went to (plugins/)."""
    pauses_in_place: bool = False
    """An update leaves running requests as they are (rollout.pause)."""
    load_model_weights: bool = False
    """Read the weights in model.path; False: the actor sends them before the first use."""

    @classmethod
    def of_run(
        cls, config: RunConfig, number: int, *, log: Path | None, cpu: bool, **place: Any
    ) -> EngineSpec:
        """An engine of a run. place: host, port, keys, first_gpu and span."""
        return cls(
            number=number, model=config.model, rollout=config.rollout, log=log, seed=config.seed + number,
            cpu=cpu, record_routing=config.actor.experts.replay_routing,
            pauses_in_place=config.rollout.pause == "in_place", **place,
        )  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def log_of(run: Path, number: int, node: int = 0) -> Path:
    """Of an engine, or its part on a further one of its nodes."""
    return run / "logs" / f"engine-{number}{f'-node-{node}' if node else ''}.log"


def engine_options(spec: EngineSpec) -> dict[str, Any]:
    """The engine's ServerArgs by field name; ConfigError for an option that does not exist or is not free,
    ModelError for a model of which SGLang starts no engine."""
    check_served(Path(spec.model.path), cpu=spec.cpu)
    check_options(spec.rollout.sglang, OUR_OPTIONS)
    check_parsers(spec.rollout.agent)
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
    if spec.span.nodes > 1:
        options |= {
            "nnodes": spec.span.nodes, "node_rank": spec.span.node, "dist_init_addr": spec.span.rendezvous
        }  # fmt: skip
    if spec.keys.api is not None:
        options["api_key"] = spec.keys.api
    if spec.record_routing:
        _check_recording(spec)
        options["enable_return_routed_experts"] = True
    if spec.pauses_in_place:
        # Else the step under way goes on while weights are loaded, and its tokens count as of the new ones:
        # pause_generation, which takes its results with `retract`, returns at once (SGLang, scheduler.py).
        options["disable_overlap_schedule"] = True
    if spec.keys.admin is not None:
        options["admin_api_key"] = spec.keys.admin
    if spec.rollout.max_total_tokens is not None:
        options["max_total_tokens"] = spec.rollout.max_total_tokens
    if not spec.load_model_weights:  # a folder whose weights are read says itself what they are
        if spec.rollout.fp8:
            options["json_model_override_args"] = json.dumps({"quantization_config": _fp8_config(spec)})
        elif "quantization_config" in (read_object(Path(spec.model.path) / "config.json") or {}):
            # the folder is FP8 or MXFP4, and the actor sends bf16
            options["json_model_override_args"] = json.dumps({"quantization_config": None})
    options |= _cpu_options(spec) if spec.cpu else _gpu_options(spec)
    return options | spec.rollout.sglang


def expert_parallel(rollout: Rollout) -> int:
    """Into how many equal shares an engine's ranks divide each layer's experts, in the order of the ranks.

    1: every rank computes with a part of each expert, or the engine itself decides who holds which.
    """
    options = rollout.sglang
    if any(options.get(name, value) != value for name, value in MOVES_EXPERTS.items()):
        return 1
    return rollout.expert_groups


def _check_recording(spec: EngineSpec) -> None:
    """ConfigError for experts that are chosen inside a kernel, of which SGLang then records nothing."""
    kernels = spec.rollout.sglang.get("moe_runner_backend", "auto")
    model = read_object(Path(spec.model.path) / "config.json") or {}
    if kernels == "auto" and model.get("model_type") == "gpt_oss" and not spec.cpu:
        kernels = "triton_kernel"  # its own choice, in arg_groups/model_overrides/gpt_oss.py
    if kernels == "triton_kernel":
        raise ConfigError(
            f"actor.experts.replay_routing: for {spec.model.path} SGLang 0.5.23 takes "
            "moe_runner_backend=triton_kernel, which chooses experts inside the kernel and records none; set "
            'rollout.sglang={"moe_runner_backend": "triton"}'
        )


def _fp8_config(spec: EngineSpec) -> dict[str, Any]:
    if spec.cpu:
        raise ConfigError("rollout.fp8 needs CUDA: SGLang has no FP8 matrices on a CPU")
    return quantization_config(TensorFiles(Path(spec.model.path)).tensors)


def _gpu_options(spec: EngineSpec) -> dict[str, Any]:
    shared = spec.rollout.placement == "colocated"
    return {"base_gpu_id": spec.first_gpu, **({"enable_memory_saver": True} if shared else {})}


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
    # else SGLang takes the first interface it finds, or looks up the host's name, which may stand for nothing
    leads_several = spec.span.nodes > 1 and spec.span.node == 0 and spec.span.rendezvous
    environment["SGLANG_HOST_IP"] = leads_several.rpartition(":")[0] if leads_several else spec.host
    if spec.span.nodes == 1 and spec.host == LOOPBACK:  # a run's ranks have been told which they are
        for name, value in network.variables(network.loopback()).items():
            environment.setdefault(name, value)
    # The loader runs inside the engine, where this package need not be installed.
    path = [str(Path(__file__).parents[2]), str(Path(__file__).parent / "contained")]
    if spec.record_routing:
        path.append(str(Path(__file__).parent / "plugins"))
    if spec.cpu:
        path.insert(0, str(Path(__file__).parent / "cpu"))
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        # SGLang takes an NCCL that loads for a sign of GPUs, and torch's CUDA build brings one
        # (distributed/device_communicators/pynccl.py): tensor-parallel engines would die at their start
        environment["SGLANG_NCCL_SO_PATH"] = "no NCCL on a CPU"
        environment["OMP_NUM_THREADS"] = str(spec.rollout.threads_per_engine)
        # tensor-parallel embeddings and Gemma 3's rotary one are compiled, by a compiler that is not there
        environment["TORCHDYNAMO_DISABLE"] = "1"
        if spec.rollout.tensor_parallel > 1:
            # SGLang else refuses more ranks than the machine has NUMA nodes; here they share its cores
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([cores] * spec.rollout.tensor_parallel)
    environment["PYTHONPATH"] = os.pathsep.join(path + [p for p in [environment.get("PYTHONPATH")] if p])
    return environment


class EngineProcess(ServerProcess):
    """One SGLang server, or the part of one that is on this node.

    When this process dies, however it dies, the server and its children die with it.
    """

    def __init__(self, spec: EngineSpec) -> None:
        """Starts the engine and returns at once.

        Before any start: what engine_options() raises, MissingPackage for DeepEP.
        """
        options = engine_options(spec)
        if options.get("moe_a2a_backend") == "deepep" and importlib.util.find_spec("deep_ep") is None:
            raise MissingPackage(
                f"rollout.sglang.moe_a2a_backend=deepep: DeepEP (module deep_ep) is not installed on "
                f"{socket.gethostname()}, and the engine would die in its first forward pass; install "
                "sgl-deep-ep at the version that the installed sglang requires, or leave the option out"
            )
        assert spec.log is not None, "an engine of ours has a log"
        self.spec = spec
        environment = engine_environment(spec)
        self._ready_before = None if spec.cpu else ready_before(options)
        self._compiles = self._ready_before is not None and not self._ready_before.exists()
        if self._compiles:
            # SGLang ends itself when its first request takes 600 s or one pass 300 s, and NCCL when ranks
            # wait 600 s for the one that compiles
            seconds = math.ceil(spec.rollout.cold_start_timeout_seconds)
            environment.setdefault("SGLANG_WARMUP_TIMEOUT", str(seconds))
            options = {"watchdog_timeout": seconds, "dist_timeout": seconds} | options
        arguments = spec.log.with_name(spec.log.name + ".yaml")
        # SGLang's --config wants YAML, and JSON is YAML.
        write_arguments(arguments, {server_options()[name]: value for name, value in options.items()})
        command = [sys.executable, "-W", "ignore", "-m", "sglang.launch_server", "--config", str(arguments)]
        name, span = f"engine {spec.number}", spec.span
        if span.nodes > 1:
            name += f", node {span.node} of {span.nodes}"
        super().__init__(name, command, environment, spec.url, READY_PATH, spec.log)

    def wait_ready(self, deadline_seconds: float, meanwhile: str = "") -> None:
        """See ServerProcess; longer where the engine's kernels are compiled first."""
        if self._compiles:
            deadline_seconds = max(deadline_seconds, self.spec.rollout.cold_start_timeout_seconds)
            meanwhile = "it compiles kernels, as at each first start of a version on a node"
        super().wait_ready(deadline_seconds, meanwhile)
        if self._ready_before is not None:
            with suppress(OSError):  # then the next start has the longer deadline, too
                self._ready_before.parent.mkdir(parents=True, exist_ok=True)
                self._ready_before.touch()
