"""The whole tree, with the settings that belong to the run."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from megatron_pmd.config.actor import Actor, Model, Optimizer
from megatron_pmd.config.algorithm import Alarms, Algorithm
from megatron_pmd.config.data import Data, Evaluation, ProblemSource, Reward, Stage
from megatron_pmd.config.frozen import Frozen, Seed
from megatron_pmd.config.layout import Layout
from megatron_pmd.config.rollout import Rollout, Sync
from megatron_pmd.config.trackers import Trackers
from megatron_pmd.config.training import Batch, Checkpoint, WarmStart
from megatron_pmd.errors import ConfigError, LayoutError

StopAfter = Literal["rollout"]
"""Phases after which a run can be asked to stop."""


LOG_PROB_BOUNDS = {"fp32": (1e-5, 1e-4), "bf16": (0.1, 2.0), "fp8": (0.3, 5.0)}
"""Mean and 99th percentile of |log π_actor − log π_engine| that kernels of a precision explain, in nats. FP8:
that of the engines, of the actor, or of both. Where the numbers are from: docs/weight_sync.md."""


class RunConfig(Frozen):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Folder of the run under runs/."""
    seed: Seed = 0
    """Of the order of prompts and of every draw. Which engines draw by it: docs/rollout.md, "Seeds"."""
    iterations: PositiveInt
    model: Model
    layout: Layout = Layout()
    batch: Batch
    algorithm: Algorithm = Field(default_factory=Algorithm)
    optimizer: Optimizer
    actor: Actor = Actor()
    rollout: Rollout = Rollout()
    sync: Sync = Sync()
    data: Data
    reward: Reward
    evaluation: Evaluation = Evaluation()
    alarms: Alarms = Alarms()
    checkpoint: Checkpoint = Checkpoint()
    warm_start: WarmStart | None = None
    trackers: Trackers = Trackers()

    @property
    def ranks_per_engine(self) -> int:
        if self.rollout.servers:
            return self.layout.ranks // len(self.rollout.servers)
        return self.rollout.ranks_per_engine or self.rollout.tensor_parallel

    @property
    def engines_elsewhere(self) -> bool:
        """Whether engines share no node with ranks: on nodes of their own, or servers of others."""
        return bool(self.rollout.servers or self.layout.engine_nodes)

    @property
    def devices_per_engine(self) -> int:
        """Ranks on whose devices an engine computes; for one elsewhere, the one that calls it."""
        return 1 if self.engines_elsewhere else self.rollout.tensor_parallel

    @property
    def devices_beside_ranks(self) -> int:
        """Devices that an engine takes of its node beside those of its ranks."""
        separate = self.rollout.placement == "separate" and not self.engines_elsewhere
        return self.rollout.tensor_parallel if separate else 0

    @property
    def engines_per_node(self) -> int:
        """On each of layout.engine_nodes; 0 without those."""
        nodes = self.layout.engine_nodes
        return self.engines // nodes if nodes else 0

    @property
    def devices_per_engine_node(self) -> int:
        """That the engines of each of layout.engine_nodes take."""
        return self.engines_per_node * self.rollout.tensor_parallel

    @property
    def devices(self) -> int:
        """Of the actor and of the run's own engines, together."""
        beside = self.rollout.tensor_parallel if self.layout.engine_nodes else self.devices_beside_ranks
        return self.layout.ranks + self.engines * beside

    @property
    def longest_rollout_seconds(self) -> float:
        """What the deadlines of requests allow a rollout to take at the very most."""
        sampling, rounds = self.rollout, 1
        if sampling.function or sampling.agent:
            rounds *= sampling.max_turns
        if sampling.repetition:
            rounds += self.batch.max_response_tokens // sampling.repetition.window_tokens
        tools = sampling.agent.timeout_seconds if sampling.agent else 0.0
        teacher = self.algorithm.teacher
        scoring = teacher.timeout_seconds * (teacher.retries + 1) if teacher else 0.0
        group = rounds * sampling.request_timeout_seconds * (sampling.retries + 1) + tools + scoring
        # the next group begins when one is dropped
        return group * (1 + sampling.group_filter.max_dropped) if sampling.group_filter else group

    @property
    def longest_silence_seconds(self) -> float:
        """How long a rank may give no sign of life where it computes nothing: an engine may be starting."""
        starts = self.rollout.start_timeout_seconds * (self.rollout.restarts + 1)
        return max(starts, self.rollout.cold_start_timeout_seconds) + self.actor.timeout_seconds

    @property
    def engines(self) -> int:
        return self.layout.ranks // self.ranks_per_engine

    @property
    def hosts_gather_states(self) -> bool:
        """Whether a checkpoint's states of Adam pass from host to host, not from device to device.

        megatron-core gathers a bucket at a time. Without a pipeline one has some 40 million parameters.
        Behind a pipeline's first stage it is the whole stage: 4 bytes a parameter of it, and of a rank's
        share in it, would come to a device that the optimizer has not left. Beside Muon it is the embeddings
        or the output layer, and megatron-core gives that Adam no group of hosts.
        """
        return self.layout.pipeline > 1 and self.optimizer.name == "adam"

    @property
    def tokens_per_pass(self) -> int:
        """Tokens of one forward pass, over the ranks that share out its sequences."""
        return self.batch.max_tokens_per_microbatch * self.layout.context

    @property
    def longest_trained_sample(self) -> int:
        """Prompt plus response tokens of one sample that a forward pass holds."""
        multiple = self.layout.sequence_multiple
        return self.tokens_per_pass // multiple * multiple

    @property
    def log_prob_bounds(self) -> tuple[float, float]:
        """Bounds in force on the mean and the 99th percentile of |log π_actor − log π_engine|."""
        fp8 = self.rollout.fp8 or self.actor.fp8 is not None
        mean, p99 = LOG_PROB_BOUNDS["fp8" if fp8 else self.model.precision]
        return self.sync.mean_log_prob_difference or mean, self.sync.p99_log_prob_difference or p99

    def problem_sources(self, stage: Stage) -> tuple[ProblemSource, ...]:
        """What data.train or data.evaluation names, with all that holds for each; () without any."""
        return tuple(
            ProblemSource.of(key, given, self.data, self.reward, self.batch.max_prompt_tokens)
            for key, given in self.data.sources_of(stage).items()
        )

    @property
    def supervised_source(self) -> ProblemSource | None:
        """Of algorithm.ptx."""
        ptx = self.algorithm.ptx
        key, longest_prompt = "algorithm.ptx.source", self.batch.max_prompt_tokens
        return ProblemSource.of(key, ptx.source, self.data, self.reward, longest_prompt) if ptx else None

    @property
    def all_sources(self) -> tuple[ProblemSource, ...]:
        """Everything that the run reads problems from."""
        further = (self.supervised_source,) if self.supervised_source else ()
        return (*self.problem_sources("train"), *self.problem_sources("evaluation"), *further)

    @property
    def rewards(self) -> tuple[Reward, ...]:
        """Of each source whose responses are graded."""
        return tuple(s.reward for s in (*self.problem_sources("train"), *self.problem_sources("evaluation")))

    def resolved(self) -> RunConfig:
        """With what follows from other settings written out: a run's config.json says what is in force."""
        mean, p99 = self.log_prob_bounds
        bounds = {"mean_log_prob_difference": mean, "p99_log_prob_difference": p99}
        return self.model_copy(update={"sync": self.sync.model_copy(update=bounds)})

    def warnings(self) -> list[str]:
        """What works and is most likely not meant, by the settings' names; said when a run starts."""
        found = []
        if self.rollout.top_p < 1 and not self.algorithm.objective.supervised:
            found.append(
                f"rollout.top_p={self.rollout.top_p:g}: tokens outside the nucleus are never drawn, while "
                "log π_t and the engines' log-probabilities are of all tokens. The samples are of another "
                "policy than the anchor, and nothing corrects for it: set rollout.top_p=1"
            )
        return found

    def asks_for_deepep(self) -> list[str]:
        """The settings that send tokens to experts through DeepEP, as `key=value`."""
        settings = {
            "actor.experts.dispatcher": self.actor.experts.dispatcher,
            "rollout.sglang.moe_a2a_backend": self.rollout.sglang.get("moe_a2a_backend"),
        }
        return [f"{key}={value}" for key, value in settings.items() if value == "deepep"]

    def needs_cuda(self) -> list[str]:
        """The settings that nothing but CUDA can carry out, as `key=value`."""
        # megatron-core checkpoints these two through a function that asks Transformer Engine for its state
        through_te = [m for m in self.actor.recompute_modules if m in ("moe_act", "mla_up_proj")]
        settings = {
            "actor.recompute_modules": ", ".join(through_te),
            "actor.fp8.recipe": self.actor.fp8 and self.actor.fp8.recipe,
            "actor.experts.dispatcher": self.actor.experts.dispatcher == "deepep" and "deepep",
            "optimizer.offload": self.optimizer.offload,
            "optimizer.moments": self.optimizer.moments != "fp32" and self.optimizer.moments,
            "optimizer.qk_clip_threshold": self.optimizer.qk_clip_threshold,
        }
        return [f"{key}={value}" for key, value in settings.items() if value]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.algorithm.check(self.batch.samples_per_prompt)
        self._check_anchor()
        self._check_supervision()
        self._check_teacher()
        self._check_servers()
        if self.ranks_per_engine < self.devices_per_engine or self.layout.ranks % self.ranks_per_engine:
            raise LayoutError(
                f"rollout: {self.layout.ranks} actor ranks cannot be shared out to engines of "
                f"ranks_per_engine={self.ranks_per_engine} (tensor_parallel={self.rollout.tensor_parallel})"
            )
        self._check_engine_nodes()
        self._check_lengths()
        self._check_precision()
        objective = self.algorithm.objective
        supervised = "algorithm.ptx" if self.algorithm.ptx else f"algorithm.objective={objective.name}"
        if self.actor.experts.replay_routing and (self.algorithm.ptx or objective.supervised):
            raise ConfigError(
                f"actor.experts.replay_routing with {supervised}: no engine has chosen experts for the "
                "examples; turn one of them off"
            )
        if self.actor.experts.dispatcher == "deepep" and self.layout.expert == 1:
            raise ConfigError(
                "actor.experts.dispatcher=deepep moves tokens between expert-parallel ranks: "
                "set layout.expert above 1, or use alltoall"
            )
        return self

    def _check_servers(self) -> None:
        servers, ranks = len(self.rollout.servers), self.layout.ranks
        if servers and ranks % servers:
            raise LayoutError(
                f"{servers} rollout.servers cannot be shared out evenly to {ranks} actor ranks, "
                "at most one to each"
            )
        if servers and self.sync.transport == "ipc":
            raise ConfigError(
                "sync.transport=ipc is for engines beside the actors; rollout.servers take weights by "
                "broadcast, over the network, or by disk, from a run folder that they see"
            )
        if not self.engines_elsewhere and self.sync.transport == "broadcast":
            raise ConfigError(
                "sync.transport=broadcast is for rollout.servers and layout.engine_nodes; engines beside the "
                "actors open buckets where they are: use ipc"
            )

    def _check_engine_nodes(self) -> None:
        nodes = self.layout.engine_nodes
        if not nodes:
            return
        if self.rollout.placement != "separate" or self.rollout.servers:
            given = "rollout.servers" if self.rollout.servers else "rollout.placement=colocated"
            raise ConfigError(
                f"layout.engine_nodes={nodes} with {given}: nodes with engines alone are for engines of this "
                "run that have devices of their own; set rollout.placement=separate, or engine_nodes=0"
            )
        if self.sync.transport == "ipc":
            raise ConfigError(
                "sync.transport=ipc is for engines beside the actors; engines on layout.engine_nodes take "
                "weights by broadcast, over the network, or by disk, from the run folder"
            )
        if self.engines % nodes:
            raise LayoutError(
                f"layout.engine_nodes={nodes} cannot have equal shares of {self.engines} engines "
                f"({self.layout.ranks} actor ranks, one engine for each {self.ranks_per_engine}); set "
                f"layout.engine_nodes={math.gcd(self.engines, nodes)}, or other rollout.ranks_per_engine"
            )

    def _check_lengths(self) -> None:
        batch, context, multiple = self.batch, self.layout.context, self.layout.sequence_multiple
        longest = -(-(batch.max_prompt_tokens + batch.max_response_tokens) // multiple) * multiple
        if longest > self.tokens_per_pass:
            raise ConfigError(
                f"batch.max_tokens_per_microbatch={batch.max_tokens_per_microbatch} cannot hold one sample "
                f"of {batch.max_prompt_tokens} prompt + {batch.max_response_tokens} response tokens"
                + (f" shared by layout.context={context} ranks" if context > 1 else "")
                + f"; raise it to {-(-longest // context)}"
            )
        for source in self.all_sources:
            for limit in ("max_prompt_tokens", "max_response_tokens"):
                own, most = getattr(source, limit), getattr(batch, limit)
                if own is not None and own > most:
                    raise ConfigError(
                        f"{source.key}.{limit}={own} is over batch.{limit}={most}, which holds for every "
                        "source: lower it, or raise the batch's"
                    )
        cache, needed = self.rollout.max_total_tokens, batch.max_prompt_tokens + batch.max_response_tokens
        if cache is not None and cache < needed:
            raise ConfigError(
                f"rollout.max_total_tokens={cache} cannot hold one sample: {batch.max_prompt_tokens} prompt "
                f"+ {batch.max_response_tokens} response tokens; raise it to {needed} or many times that"
            )

    def _check_precision(self) -> None:
        fp8, precision = self.actor.fp8, self.model.precision
        if fp8 and precision != "bf16":
            raise ConfigError(
                f"actor.fp8 with model.precision={precision}: FP8 kernels take and give bf16; "
                "set model.precision=bf16"
            )
        if fp8 and fp8.parameter_gather and self.optimizer.offload:
            raise ConfigError(
                f"actor.fp8.parameter_gather with optimizer.offload={self.optimizer.offload:g}: the Adam on "
                "the host writes bf16 parameters, not FP8 ones; turn one of them off"
            )
        if self.actor.lora and self.optimizer.name == "muon":
            raise ConfigError(
                "actor.lora with optimizer.name=muon: steps of adapters by Muon are tested by nobody; set "
                "optimizer.name=adam"
            )
        if fp8 and fp8.parameter_gather and self.optimizer.name == "muon":
            raise ConfigError(
                "actor.fp8.parameter_gather with optimizer.name=muon: megatron-core's layer-wise optimizer, "
                "in which Muon runs, knows bf16 and fp32 parameters alone; turn one of them off"
            )
        if self.optimizer.offload and precision != "bf16":
            raise ConfigError(
                f"optimizer.offload={self.optimizer.offload:g} with model.precision={precision}: "
                "megatron-core's optimizer on the host can be resumed for models trained in bf16 alone; "
                "choose one of the two"
            )
        threshold = self.optimizer.qk_clip_threshold
        if threshold and precision != "bf16":
            raise ConfigError(
                f"optimizer.qk_clip_threshold={threshold:g} with model.precision={precision}: "
                "megatron-core's clip_qk finds the layers of models trained in bf16 alone; leave it unset"
            )
        if self.optimizer.moments == "bf16" and precision != "bf16":
            raise ConfigError(
                f"optimizer.moments=bf16 with model.precision={precision}: megatron-core's precision-aware "
                "optimizer is for models trained in bf16"
            )

    def _check_anchor(self) -> None:
        partial, staleness = self.rollout.partial, self.rollout.staleness
        if self.algorithm.anchor == "engine" and staleness:
            raise ConfigError(
                f"algorithm.anchor=engine with rollout.staleness={staleness}: an anchor older than π_t takes "
                "back what was learnt since; set algorithm.anchor=trainer"
            )
        if self.algorithm.anchor == "engine" and partial and partial.count_earlier_segments:
            raise ConfigError(
                "algorithm.anchor=engine with rollout.partial: the engines' log-probabilities of an earlier "
                "segment are of earlier weights, not of π_t; set rollout.partial.count_earlier_segments to "
                "false, or algorithm.anchor to trainer"
            )

    def _check_teacher(self) -> None:
        if self.algorithm.teacher is None:
            return
        if self.rollout.temperature != 1 or self.rollout.temperature_schedule:
            raise ConfigError(
                f"algorithm.teacher with rollout.temperature={self.rollout.temperature:g}"
                + (" and a schedule of it" if self.rollout.temperature_schedule else "")
                + ": SGLang gives a teacher's log-probabilities at temperature 1, and the policy would learn "
                "them at another; set rollout.temperature=1 and rollout.temperature_schedule=null"
            )
        if self.rollout.agent:
            raise ConfigError(
                "algorithm.teacher with rollout.agent: a teacher scores one trajectory a response, and "
                "an agent's episode may have several; set one of them to null"
            )
        if self.rollout.group_filter and self.rollout.group_filter.drop_equal_rewards:
            raise ConfigError(
                "algorithm.teacher with rollout.group_filter.drop_equal_rewards: the teacher tells responses "
                "of equal rewards apart; set it to false"
            )

    def _check_supervision(self) -> None:
        objective = self.algorithm.objective
        if not objective.supervised:
            return
        for name, given in (("warm_start", self.warm_start), ("algorithm.ptx", self.algorithm.ptx)):
            if given is not None:
                raise ConfigError(
                    f"{name} is supervised training beside a rollout; algorithm.objective={objective.name} "
                    "has none"
                )
        drawing = {
            name: getattr(self.rollout, name) for name in ("group_filter", "partial", "repetition", "agent")
        }
        drawing |= {"function": self.rollout.function, "placement": self.rollout.placement == "separate"}
        for name, given in drawing.items():
            if given:
                raise ConfigError(
                    f"rollout.{name} is set, but algorithm.objective={objective.name} draws no responses"
                )
        if self.batch.samples_per_prompt != 1:
            raise ConfigError(
                f"batch.samples_per_prompt={self.batch.samples_per_prompt}: with "
                f"algorithm.objective={objective.name} a problem has one response, its answer; set it to 1"
            )
