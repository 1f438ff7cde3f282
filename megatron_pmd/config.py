"""The run as one tree of frozen, validated models. Imports no torch: a login node can plan and launch."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from megatron_pmd.errors import ConfigError, LayoutError

Baseline = Literal["mean", "mean_loo", "partition", "partition_loo"]
Normaliser = Literal["response", "max_response", "none"]
Precision = Literal["fp32", "bf16"]
StopAfter = Literal["rollout"]
"""Phases after which a run can be asked to stop."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Model(Frozen):
    path: str
    """Hugging Face folder: config.json, tokenizer, safetensors."""
    prepare: str | None = None
    """`module:function` called with the path, once, when the folder does not exist yet; makes the model."""
    precision: Precision = "bf16"
    """Parameters and compute of actor and engines. The optimizer always keeps fp32 main parameters."""


class Layout(Frozen):
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    expert: PositiveInt = 1
    expert_tensor: PositiveInt | None = None
    """Tensor-parallel size inside an expert; None: 1 with expert parallelism, else `tensor`."""
    data: PositiveInt = 1
    """Data-parallel replicas of the dense layers; the experts' replicas follow from it."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def experts_tensor(self) -> int:
        return self.expert_tensor or (1 if self.expert > 1 else self.tensor)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        per_stage = self.tensor * self.data
        if per_stage % (self.expert * self.experts_tensor):
            raise LayoutError(
                f"layout: tensor={self.tensor} x data={self.data} ({per_stage} ranks a pipeline stage) "
                f"cannot hold expert={self.expert} x expert_tensor={self.experts_tensor}; "
                f"choose them so that they divide {per_stage}"
            )
        if self.expert == 1 and self.experts_tensor != self.tensor:
            raise LayoutError(
                f"layout: expert_tensor={self.experts_tensor} without expert parallelism must be "
                f"tensor={self.tensor}: megatron-core would not sum the experts' gradients over the "
                "tensor-parallel ranks"
            )
        return self


class Batch(Frozen):
    prompts_per_rollout: PositiveInt
    """Prompts sampled per iteration, over all engines."""
    samples_per_prompt: PositiveInt
    """Responses to each prompt: the group size K."""
    prompts_per_step: PositiveInt
    """Prompts in one optimizer step, over all data-parallel ranks; divides prompts_per_rollout."""
    max_tokens_per_microbatch: PositiveInt
    """Prompt and response tokens packed into one forward pass, per GPU."""
    max_prompt_tokens: PositiveInt
    """Longer prompts are dropped and counted."""
    max_response_tokens: PositiveInt
    """A response is cut here; its finish reason is then `length`."""

    @property
    def samples_per_rollout(self) -> int:
        return self.prompts_per_rollout * self.samples_per_prompt

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def steps_per_rollout(self) -> int:
        return self.prompts_per_rollout // self.prompts_per_step

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.prompts_per_rollout % self.prompts_per_step:
            raise ConfigError(
                f"batch.prompts_per_rollout={self.prompts_per_rollout} is not a multiple of "
                f"batch.prompts_per_step={self.prompts_per_step}: a rollout must fill whole optimizer steps"
            )
        longest = self.max_prompt_tokens + self.max_response_tokens
        if longest > self.max_tokens_per_microbatch:
            raise ConfigError(
                f"batch.max_tokens_per_microbatch={self.max_tokens_per_microbatch} cannot hold one sample of "
                f"{self.max_prompt_tokens} prompt + {self.max_response_tokens} response tokens; "
                f"raise it to {longest}"
            )
        return self


class Algorithm(Frozen):
    baseline: Baseline = "mean"
    """`mean` is PMD-mean (Kimi K1.5/K2); see docs/algorithm.md."""
    tau: PositiveFloat = 0.1
    """Regularisation strength τ, in reward units."""
    normaliser: Normaliser = "response"
    """What a sequence's loss is divided by: its own counted tokens, max_response_tokens, or 1."""

    def check(self, batch: Batch) -> None:
        if self.baseline.endswith("_loo") and batch.samples_per_prompt < 2:
            raise ConfigError(
                f"algorithm.baseline={self.baseline} leaves one response out: "
                "batch.samples_per_prompt must be at least 2"
            )


class Optimizer(Frozen):
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0; constant afterwards."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    gradient_clip: PositiveFloat = 1.0
    """Global gradient norm is clipped to this."""


class Actor(Frozen):
    threads_per_rank: PositiveInt = 1
    """CPU only: OpenMP threads of each actor rank."""
    recompute: Literal["none", "full"] = "none"
    """`full`: every layer's activations are recomputed in the backward pass."""
    log_prob_chunk_tokens: PositiveInt = 1024
    """Tokens whose vocabulary-wide fp32 logits exist at one time."""
    timeout_seconds: PositiveFloat = 600.0
    """Deadline of every collective between actor ranks; a rank that misses it stops the run."""
    megatron: dict[str, Any] = {}
    """Further fields of megatron-core's TransformerConfig, by their own names."""


class Rollout(Frozen):
    tensor_parallel: PositiveInt = 1
    """Tensor-parallel size of one engine."""
    ranks_per_engine: PositiveInt | None = None
    """Consecutive actor ranks that share one engine; None: tensor_parallel."""
    temperature: PositiveFloat = 1.0
    """Also divides the actor's logits: π is the policy at this temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    max_running_requests: PositiveInt = 64
    """Requests decoded at one time, per engine."""
    max_total_tokens: PositiveInt | None = None
    """Size of each engine's KV cache; None: SGLang sizes it from free memory (not on a CPU: it takes all)."""
    threads_per_engine: PositiveInt = 1
    """CPU only: OpenMP threads of each engine."""
    start_timeout_seconds: PositiveFloat = 300.0
    request_timeout_seconds: PositiveFloat = 600.0
    """From sending a request to its last token, retries not counted."""
    retries: NonNegativeInt = 5
    """Times one request is sent again after an engine failed it."""
    sglang: dict[str, Any] = {}
    """Further fields of SGLang's ServerArgs, by their own names."""


class Sync(Frozen):
    bucket_megabytes: PositiveInt = 512
    """Weights move to the engines in flattened buckets of this size; two exist at a time."""
    timeout_seconds: PositiveFloat = 300.0
    """Deadline for each bucket, and for the engine's confirmation of the new version."""
    mean_log_prob_difference: PositiveFloat | None = None
    """Bound on mean |log π_actor − log π_engine| of the sampled tokens; None: 1e-5 (fp32), 1e-1 (bf16)."""
    max_log_prob_difference: PositiveFloat | None = None
    """Bound on the largest difference; None: 1e-3 (fp32), 5.0 (bf16)."""


class FileSource(Frozen):
    kind: Literal["file"] = "file"
    path: str
    """JSON lines (.jsonl) or Parquet (.parquet): one problem a row."""
    prompt_key: str = "prompt"
    """A string, or a list of chat messages with role and content."""
    answer_key: str = "answer"


class ReasoningGymSource(Frozen):
    kind: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """A reasoning-gym dataset, by name."""
    size: PositiveInt
    seed: NonNegativeInt = 0
    parameters: dict[str, Any] = {}
    """The task's own settings, e.g. min_digits."""


Source = Annotated[FileSource | ReasoningGymSource, Field(discriminator="kind")]


class Data(Frozen):
    train: Source
    evaluation: Source | None = None
    """Held-out problems."""
    system_prompt: str | None = None
    """None: what the model's chat template adds by itself."""
    prompt_suffix: str = ""
    """Appended to every problem's text, e.g. how to format the answer."""
    shuffle: bool = True


class Reward(Frozen):
    name: str
    """`math`, `reasoning_gym`, `exact`, or a `module:function`: function(response, problem) -> float."""
    answer: Literal["whole", "last_integer", "last_line"] = "whole"
    """Which part of the response is graded."""
    timeout_seconds: PositiveFloat = 10.0
    """For one sample; a reward that takes longer counts as 0."""
    workers: PositiveInt = 2
    """Processes."""


class Evaluation(Frozen):
    every: PositiveInt | None = None
    """Iterations between evaluations; None: before the first and after the last, with data.evaluation."""
    prompts: PositiveInt = 64
    """The first so many held-out problems."""
    samples_per_prompt: PositiveInt = 1
    temperature: NonNegativeFloat = 1.0
    """0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)


class Checkpoint(Frozen):
    every: PositiveInt | None = 10
    """Iterations between checkpoints; one is always written after the last iteration. None: only that one."""
    keep: PositiveInt = 2
    """The newest so many are kept."""
    hf_export: bool = True
    """Write the final model as a Hugging Face folder, hf/iteration-N."""


class WarmStart(Frozen):
    """Supervised steps on the training problems' answers, before the first iteration, in the same actor."""

    steps: PositiveInt
    learning_rate: PositiveFloat
    problems_per_step: PositiveInt


class RunConfig(Frozen):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Folder of the run under runs/."""
    seed: NonNegativeInt = 0
    iterations: PositiveInt
    model: Model
    layout: Layout = Layout()
    batch: Batch
    algorithm: Algorithm = Algorithm()
    optimizer: Optimizer
    actor: Actor = Actor()
    rollout: Rollout = Rollout()
    sync: Sync = Sync()
    data: Data
    reward: Reward
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    warm_start: WarmStart | None = None

    @property
    def ranks_per_engine(self) -> int:
        return self.rollout.ranks_per_engine or self.rollout.tensor_parallel

    @property
    def engines(self) -> int:
        return self.layout.ranks // self.ranks_per_engine

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.algorithm.check(self.batch)
        if self.ranks_per_engine < self.rollout.tensor_parallel or self.layout.ranks % self.ranks_per_engine:
            raise LayoutError(
                f"rollout: {self.layout.ranks} actor ranks cannot be shared out to engines of "
                f"ranks_per_engine={self.ranks_per_engine} (tensor_parallel={self.rollout.tensor_parallel})"
            )
        return self


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the tree, inner models before their fields' own keys are listed under them."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for inner in _models_in(field.annotation):
            keys += known_keys(inner, f"{prefix}{name}.")
    return list(dict.fromkeys(keys))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [m for argument in getattr(annotation, "__args__", ()) for m in _models_in(argument)]


def build(values: dict[str, Any]) -> RunConfig:
    """Validate a tree of plain values; raises ConfigError with one line a problem."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    # a discriminated union puts its tag (`file`, `reasoning_gym`) in the location: not part of the user's key
    key = ".".join(str(p) for p in error["loc"] if p not in ("file", "reasoning_gym"))
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(RunConfig), n=1, cutoff=0.5)
        return f"{key} is not a setting" + (f" (did you mean {near[0]}?)" if near else "")
    return f"{key}: {error['msg']} (got {error['input']!r})"


def override(config: RunConfig, assignments: list[str]) -> RunConfig:
    """Apply `dotted.key=value` settings; a value is read as JSON where it is JSON, else as a string."""
    values = config.model_dump(mode="json")
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"{assignment!r} is not of the form dotted.key=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        node = values
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"{key} is not a setting: {parent} is a value, not a group of settings")
            node = child
        node[leaf] = value
    return build(values)


def load(path: Path) -> RunConfig:
    """Read a resolved config.json as written beside a run."""
    try:
        return build(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
