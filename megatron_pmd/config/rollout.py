"""Settings of the engines, and of the way the weights take to them."""

from __future__ import annotations

from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_pmd.config.algorithm import Schedule
from megatron_pmd.config.frozen import Frozen
from megatron_pmd.errors import ConfigError
from megatron_pmd.plugins import Registry, did_you_mean

ROUTER_POLICIES = ["round_robin", "cache_aware", "manual", "random", "power_of_two"]
"""What sglang-router's --policy takes. To use another of its policies, write its name here."""

PauseMode = Literal["retract", "in_place"]
"""Of SGLang's /pause_generation; its third one, `abort`, loses responses."""

TRANSPORTS = Registry(
    "transport",
    {
        "ipc": "megatron_pmd.weight_sync.transport:Colocated",
        "broadcast": "megatron_pmd.weight_sync.broadcast:Broadcast",
        "disk": "megatron_pmd.weight_sync.transport:Disk",
    },
)
"""Of weight_sync.transport.NamedTransport. To add a transport, write its class and its line here."""


class GroupFilter(Frozen):
    """A group that teaches nothing is dropped and the next prompt sampled in its place."""

    drop_equal_rewards: bool = True
    """Drop a group whose rewards are all the same: its advantages are 0."""
    mean_reward_above: float | None = None
    """Keep only groups whose mean reward is greater than this."""
    mean_reward_below: float | None = None
    """Keep only groups whose mean reward is less than this."""
    max_dropped: NonNegativeInt
    """Groups dropped in one rollout at most; from then on all are taken as they come."""

    @model_validator(mode="after")
    def _drops_some_and_keeps_some(self) -> Self:
        above, below = self.mean_reward_above, self.mean_reward_below
        if above is not None and below is not None and above >= below:
            raise ConfigError(
                f"rollout.group_filter: no mean reward is above {above} and below {below}; change either"
            )
        if not self.drop_equal_rewards and above is None and below is None:
            raise ConfigError(
                "rollout.group_filter drops no group: set drop_equal_rewards, mean_reward_above or "
                "mean_reward_below"
            )
        return self


class PartialRollouts(Frozen):
    """Unfinished responses are stopped, kept, and continued first in the next iteration."""

    extra_groups: NonNegativeInt = 0
    """Groups in flight beyond prompts_per_rollout; the rollout ends when prompts_per_rollout are complete."""
    deadline_seconds: PositiveFloat | None = None
    """The rollout ends so long after its start with the groups then complete, in whole optimizer steps; if
    there are not enough for one step, when there are."""
    max_new_tokens: PositiveInt | None = None
    """Tokens sampled of one response in one iteration."""
    max_staleness: PositiveInt = 4
    """A response begun more than so many iterations ago is thrown away and sampled anew."""
    count_earlier_segments: bool = True
    """Whether tokens sampled under earlier weights count in the loss."""

    @model_validator(mode="after")
    def _stops_something(self) -> Self:
        if not (self.extra_groups or self.deadline_seconds or self.max_new_tokens):
            raise ConfigError(
                "rollout.partial stops no response: set extra_groups, deadline_seconds or max_new_tokens"
            )
        return self


class Repetition(Frozen):
    """A response that repeats itself is ended, with finish reason `repetition`."""

    window_tokens: PositiveInt = 256
    """A response is looked at each time it has grown by so many tokens."""
    min_repeats: int = Field(4, ge=2)
    """It ends if its last window_tokens are one sequence of tokens at least so many times over."""

    @model_validator(mode="after")
    def _window_holds_repeats(self) -> Self:
        if self.window_tokens < self.min_repeats:
            raise ConfigError(
                f"rollout.repetition.window_tokens={self.window_tokens} cannot hold "
                f"min_repeats={self.min_repeats} of even one token"
            )
        return self


class AgentProgram(Frozen):
    """A program makes each response over an OpenAI-compatible endpoint of its own (docs/agents.md)."""

    function: str
    """`module:function` or `path/to/file.py:function`: gets an AgentTask, returns the text to be graded."""
    timeout_seconds: PositiveFloat = 1800.0
    """A program that has not returned so long after its start is ended, and its response graded 0."""
    tool_parser: str | None = None
    """How this model writes calls of tools, by SGLang's name, as `qwen25`; None: programs may offer none."""
    reasoning_parser: str | None = None
    """How this model marks its thoughts, by SGLang's name, as `qwen3`; None: they are part of its words."""


class Rollout(Frozen):
    tensor_parallel: PositiveInt = 1
    """Tensor-parallel size of one engine; one that is larger than a node reaches over several."""
    fp8: bool = False
    """Engines get and compute with blockwise (128x128) FP8 weights; not on a CPU. Which layers:
    docs/weight_sync.md."""
    ranks_per_engine: PositiveInt | None = None
    """Consecutive actor ranks that share one engine; None: tensor_parallel. With layout.engine_nodes: of
    which one leads an engine there."""
    placement: Literal["colocated", "separate"] = "colocated"
    """`colocated`: engines and actor ranks take turns on the same devices. `separate`: engines have devices
    of their own, with CUDA the node's behind those of its ranks, or of layout.engine_nodes, and keep their
    weights (docs/overlap.md)."""
    staleness: NonNegativeInt = 0
    """Iterations by which rollouts are sampled ahead of training; 0: each by the weights that train on it.
    For placement=separate."""
    pause: PauseMode = "retract"
    """What separate engines do with running responses while they take weights, in SGLang's words. `retract`:
    they compute their KV cache again under the new weights. `in_place`: they keep it, and the tokens behind
    it are of no single policy (docs/overlap.md)."""
    servers: tuple[str, ...] = ()
    """`http://host:port` of SGLang servers that others started, in the place of engines beside the actors.
    Their options are those they were started with; they take weights by `broadcast` or `disk`. One that is
    lost is left out until it answers again (docs/rollout.md)."""
    temperature: PositiveFloat = 1.0
    """Also divides the actor's logits: π is the policy at this temperature."""
    temperature_schedule: Schedule | None = None
    """Temperature over the iterations, from rollout.temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Below 1 the samples are of another policy than the anchor log π_t; a run then says so at its start."""
    max_running_requests: PositiveInt = 64
    """Requests decoded at one time, per engine."""
    max_total_tokens: PositiveInt | None = None
    """Size of each engine's KV cache; None: SGLang sizes it from free memory (not on a CPU: it takes all)."""
    threads_per_engine: PositiveInt = 1
    """CPU only: OpenMP threads of each engine."""
    router_policy: str = "round_robin"
    """`round_robin`: even load, also where all prompts begin alike (docs/benchmarks.md). `cache_aware`:
    prompts that begin alike go to one engine until it is far ahead. `manual`: all requests of one group or
    conversation go to one engine. `random`, `power_of_two`: as they say."""
    start_timeout_seconds: PositiveFloat = 300.0
    """Deadline for an engine to answer after its start."""
    cold_start_timeout_seconds: PositiveFloat = 2400.0
    """The same where kernels are compiled first: with CUDA, at the first start with these versions and
    options on a node. DeepGEMM alone takes 10 to 20 minutes, as SGLang says."""
    request_timeout_seconds: PositiveFloat = 600.0
    """From sending a request to its last token, retries not counted."""
    retries: NonNegativeInt = 5
    """Times one request is sent again after an engine failed it; also a rollout, after all engines did."""
    health_interval_seconds: PositiveFloat = 30.0
    """Between two health checks of an engine while it generates; each has it produce a token."""
    health_timeout_seconds: PositiveFloat = 120.0
    """An engine that produces nothing for so long is stuck: it is killed and started again."""
    restarts: NonNegativeInt = 3
    """Attempts to start a lost engine again, the pause before each twice as long; then the run ends."""
    function: str | None = None
    """`module:function` that makes a response of several turns (docs/rollout.md); None: one turn."""
    agent: AgentProgram | None = None
    """In the place of `function`: a program that speaks the protocol of OpenAI's chat completions."""
    max_turns: PositiveInt = 8
    """Answers of the engines in one response; for `function` and `agent`."""
    group_filter: GroupFilter | None = None
    partial: PartialRollouts | None = None
    repetition: Repetition | None = None
    sglang: dict[str, Any] = {}
    """Further fields of SGLang's ServerArgs, by their own names."""

    @property
    def expert_groups(self) -> int:
        """Into how many groups an engine's ranks share out the experts: ep_size, but every rank is one under
        an all-to-all backend (SGLang 0.5.23, arg_groups/overrides.py: _a2a_ep_size)."""
        if self.sglang.get("moe_a2a_backend", "none") not in ("none", None):
            return self.tensor_parallel
        return self.sglang.get("ep_size", 1)

    @model_validator(mode="after")
    def _ranks_divide(self) -> Self:
        groups = {
            "ep_size": self.expert_groups,
            "attn_dp_size": self.sglang.get("attn_dp_size", 1),
        }
        for name, count in groups.items():
            if not isinstance(count, int) or count < 1 or self.tensor_parallel % count:
                raise ConfigError(
                    f"rollout.sglang.{name}={count} does not divide rollout.tensor_parallel="
                    f"{self.tensor_parallel}: SGLang makes groups of equally many ranks; change either"
                )
        return self

    @model_validator(mode="after")
    def _router_has_the_policy(self) -> Self:
        policy = self.router_policy
        if policy not in ROUTER_POLICIES:
            raise ConfigError(
                f"rollout.router_policy={policy!r} is no policy{did_you_mean(policy, ROUTER_POLICIES)}; use "
                f"{', '.join(ROUTER_POLICIES)}"
            )
        return self

    @model_validator(mode="after")
    def _cache_needs_no_scales(self) -> Self:
        """SGLang reads the scales of an FP8 cache once, when it starts, from a checkpoint, which it has not.

        It takes those of its dummy weights instead, and records them in its CUDA graphs as numbers, where no
        update reaches them (layers/quantization/kv_cache.py: k_scale_float).
        """
        kind = str(self.sglang.get("kv_cache_dtype", "auto"))
        if kind.startswith("fp8"):
            raise ConfigError(
                f"rollout.sglang.kv_cache_dtype={kind!r} needs scales that SGLang reads from a checkpoint "
                "when it starts; here it starts without weights, and would take random numbers for them. "
                "Leave it out"
            )
        return self

    @model_validator(mode="after")
    def _may_run_ahead(self) -> Self:
        if self.staleness and self.placement == "colocated":
            raise ConfigError(
                f"rollout.staleness={self.staleness} with rollout.placement=colocated: engines that take "
                "turns with the actor sample nothing while it trains; set rollout.placement=separate"
            )
        if self.partial and self.placement == "separate":
            raise ConfigError(
                "rollout.partial with rollout.placement=separate: separate engines go on with every response "
                "while the actor trains, nothing has to be stopped; use rollout.staleness instead"
            )
        return self

    @model_validator(mode="after")
    def _may_pause_in_place(self) -> Self:
        if self.pause == "in_place" and not self.staleness:
            raise ConfigError(
                "rollout.pause=in_place with rollout.staleness=0: no response runs while the engines take "
                "weights, and there is no cache to keep; set rollout.pause=retract, or rollout.staleness"
            )
        if self.pause == "in_place" and (
            self.servers or not self.sglang.get("disable_overlap_schedule", True)
        ):
            raise ConfigError(
                "rollout.pause=in_place and SGLang's overlap schedule: the step that is under way would "
                "compute with weights that change. This program starts its engines without, and cannot know "
                "of rollout.servers; remove them and rollout.sglang.disable_overlap_schedule, or set "
                "rollout.pause=retract"
            )
        return self

    @model_validator(mode="after")
    def _one_kind_of_episode(self) -> Self:
        if self.agent and self.function:
            raise ConfigError("rollout.agent with rollout.function: either makes the responses; remove one")
        if self.agent and self.partial:
            raise ConfigError(
                "rollout.agent with rollout.partial: a program that was stopped cannot go on where it was; "
                "use rollout.staleness with rollout.placement=separate instead"
            )
        return self

    @model_validator(mode="after")
    def _servers_have_addresses(self) -> Self:
        for server in self.servers:
            parts = urlsplit(server)
            if server != f"http://{parts.hostname}:{parts.port}":
                raise ConfigError(f"rollout.servers: {server!r} is not of the form http://host:port")
        if len(set(self.servers)) < len(self.servers):
            raise ConfigError("rollout.servers names a server twice")
        for name in ("ranks_per_engine", "sglang"):
            if self.servers and getattr(self, name):
                raise ConfigError(
                    f"rollout.{name} is for engines that this program starts, and means nothing to "
                    "rollout.servers: remove it"
                )
        return self


class Sync(Frozen):
    transport: str = "ipc"
    """`ipc`: engines open buckets in their node's shared memory, or with CUDA on the device that they share
    with an actor rank. For layout.engine_nodes and rollout.servers: `broadcast`, over the network, once to
    each machine; or `disk`: they read safetensors in the run folder (docs/weight_sync.md).
    Or your own, as `module:Class` or `path/to/file.py:Class`."""
    bucket_megabytes: PositiveInt = 512
    """Weights move to the engines in flattened buckets of at most this size, or of the largest tensor's;
    two exist at a time."""
    verify: Literal["checksum", "full"] = "checksum"
    """`checksum`: every tensor's words add up in the engine as in the actor. `full`: in addition every
    parameter of the engine is overwritten, loaded again and compared with what it was: a second sync."""
    timeout_seconds: PositiveFloat = 300.0
    """Deadline for each bucket, and for the engine's confirmation of the new version."""
    mean_log_prob_difference: PositiveFloat | None = None
    """Bound on mean |log π_actor − log π_engine| of the sampled tokens; None: 1e-5 (fp32), 0.1 (bf16), 0.3
    (FP8)."""
    p99_log_prob_difference: PositiveFloat | None = None
    """Bound on its 99th percentile; None: 1e-4 (fp32), 2.0 (bf16), 5.0 (FP8). The largest has an alarm,
    alarms.mismatch_max."""

    @model_validator(mode="after")
    def _verifiable(self) -> Self:
        TRANSPORTS.reference(self.transport, what="sync.transport")
        if self.verify == "full" and self.transport in ("broadcast", "disk"):
            raise ConfigError(
                f"sync.verify=full needs sync.transport=ipc: with {self.transport} SGLang loads by itself"
            )
        return self
