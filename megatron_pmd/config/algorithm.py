"""Settings of the mathematics: objective, baseline, τ, corrections, and what raises an alarm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, SerializeAsAny, model_validator

from megatron_pmd.config.data import Source
from megatron_pmd.config.frozen import Frozen
from megatron_pmd.config.services import Teacher
from megatron_pmd.errors import ConfigError
from megatron_pmd.plugins import Registry, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_pmd.algorithm.baselines import Floats
    from megatron_pmd.algorithm.losses import Constants, LossInput

OBJECTIVES = Registry(
    "objective",
    {
        "pmd": "megatron_pmd.objectives.pmd:Pmd",
        "pmd_token": "megatron_pmd.objectives.pmd_token:PmdToken",
        "reinforce": "megatron_pmd.objectives.reinforce:Reinforce",
        "grpo": "megatron_pmd.objectives.grpo:Grpo",
        "gspo": "megatron_pmd.objectives.gspo:Gspo",
        "cispo": "megatron_pmd.objectives.cispo:Cispo",
        "distillation": "megatron_pmd.objectives.distillation:Distillation",
        "sft": "megatron_pmd.objectives.sft:Sft",
    },
)
"""Subclasses of Objective by name. To add an objective, write its file and its line here."""
Counts = Literal["sequences", "tokens"]
Baseline = Literal["mean", "mean_loo", "partition", "partition_loo"]
MismatchName = Literal[
    "none", "sequence_tis", "geometric_tis", "sequence_mis", "token_veto", "token_tis", "token_mis"
]

OF_TOKENS, OF_SEQUENCES = ("token_tis", "token_mis"), ("sequence_tis", "geometric_tis", "sequence_mis")


class Schedule(Frozen):
    """From the setting's own value at the first iteration to another one."""

    end: PositiveFloat
    iterations: PositiveInt
    """Reached after so many; constant from then on."""
    shape: Literal["linear", "geometric", "cosine"] = "linear"


class MismatchWeight(Frozen):
    weight: MismatchName = "none"
    """Correction for the engine's policy not being the trainer's; docs/algorithm.md, "Engine and trainer
    differ"."""
    cap: PositiveFloat = 2.0
    """Of sequence_tis, geometric_tis and token_tis."""
    low: PositiveFloat = 0.5
    """Of sequence_mis and token_mis, as a ratio."""
    high: PositiveFloat = 2.0
    lowest: float = Field(1e-4, gt=0, le=1)
    """Of token_veto, as a ratio."""

    @property
    def bounds(self) -> dict[str, float]:
        """The settings that this weight takes."""
        names = {"tis": ["cap"], "mis": ["low", "high"], "veto": ["lowest"]}
        return {name: getattr(self, name) for name in names.get(self.weight.split("_")[-1], [])}

    @model_validator(mode="after")
    def _used(self) -> Self:
        for name in self.model_fields_set - {"weight"} - self.bounds.keys():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"algorithm.mismatch.{name} is not used by algorithm.mismatch.weight={self.weight}"
                )
        if self.low > self.high:
            raise ConfigError(f"algorithm.mismatch: low={self.low} is over high={self.high}")
        return self


class Objective(Frozen):
    """What an objective is: its settings, its loss, and what it counts. Each is a subclass in objectives/."""

    counts: ClassVar[Counts]
    """What the loss is a mean over."""
    supervised: ClassVar[bool] = False
    """Whether it trains on the problems' own answers: no engines, no anchor, no rewards."""
    distils: ClassVar[bool] = False
    """Whether its target is the teacher (LossInput.teacher_log_probs), and rewards are only measured."""
    name: str
    """What it is called in the configuration: one of OBJECTIVES, or your own `module:Class` or
    `path/to/file.py:Class`."""

    def loss(self, x: LossInput, constants: Constants) -> Tensor:
        """The loss of each sequence, [sequences], or of each token, [tokens], as `counts` says.

        Pure, in float64, neither weighted nor averaged; what is not counted may have any loss.
        """
        raise NotImplementedError  # each objective has its own

    def advantages(self, values: Floats, groups: list[int]) -> Floats:
        """The advantages as the loss takes them.

        values  [samples] reward minus baseline, in reward units
        groups  [samples] label of the sample's prompt
        """
        return values


def read_objective(value: Any) -> Objective:
    """The objective of a name or of its settings with a name; an Objective made by hand comes out the same.

    Raises ConfigError for an unknown name, and for a setting that the objective does not have.
    """
    given = {"name": value} if isinstance(value, str) else value
    values = given.model_dump() if isinstance(given, Objective) else given
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        raise ConfigError(f"algorithm.objective={value!r} names no objective: give algorithm.objective.name")
    name = values["name"]
    kind = objective_class(name)
    for key in values.keys() - kind.model_fields.keys():
        owners = [other for other in OBJECTIVES if key in objective_class(other).model_fields]
        raise ConfigError(
            f"algorithm.objective.{key} is "
            + (f"a setting of {' and '.join(owners)}, not of " if owners else "not a setting of ")
            + f"algorithm.objective={name}{did_you_mean(key, kind.model_fields)}"
        )
    return kind.model_validate(values)


def objective_class(name: str) -> type[Objective]:
    """The class that a name stands for. Raises ConfigError if it is none of an objective."""
    kind = OBJECTIVES.load(name, what="algorithm.objective.name")
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise ConfigError(
            f"algorithm.objective.name={name!r} is no subclass of megatron_pmd.config.Objective"
        )
    if getattr(kind, "counts", None) not in get_args(Counts):
        raise ConfigError(
            f"algorithm.objective.name={name!r}: {kind.__name__}.counts must be one of "
            f"{', '.join(get_args(Counts))}: what its loss is a mean over"
        )
    return kind


class Ptx(Frozen):
    weight: PositiveFloat
    """λ: the mean next-token loss of the examples times λ is added to every optimizer step's loss."""
    source: Source
    """Problems whose answers are the responses to learn."""
    examples_per_step: PositiveInt


class Algorithm(Frozen):
    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(read_objective)] = Field(
        "pmd", validate_default=True
    )
    """`pmd` is this project's; the others are there to compare it with. `sft` trains on the problems'
    answers. `algorithm.objective=grpo` is short for `algorithm.objective.name=grpo`; naming another
    objective drops the settings that the recipe gives to its own."""
    baseline: Baseline = "mean"
    """`mean` is PMD-mean (Kimi K1.5/K2); see docs/algorithm.md."""
    tau: PositiveFloat = 0.1
    """Regularisation strength τ, in reward units."""
    tau_schedule: Schedule | None = None
    """τ over the iterations, from algorithm.tau."""
    anchor: Literal["trainer", "engine"] = "trainer"
    """Whose log-probabilities are log π_t: recomputed by the actor, or the engines' own (saves a forward
    pass)."""
    mismatch: MismatchWeight = MismatchWeight()
    ptx: Ptx | None = None
    teacher: Teacher | None = None
    """Needed by `distillation`; another objective then learns from rewards and teacher together."""

    @model_validator(mode="after")
    def _mismatch_has_a_use(self) -> Self:
        weight, of_tokens = self.mismatch.weight, self.objective.counts == "tokens"
        if weight in (OF_SEQUENCES if of_tokens else OF_TOKENS):
            there = OF_TOKENS if of_tokens else OF_SEQUENCES
            raise ConfigError(
                f"algorithm.mismatch.weight={weight} does not go with "
                f"algorithm.objective={self.objective.name}, a mean over {self.objective.counts}; there are "
                f"{', '.join(there)}, token_veto and none"
            )
        if weight != "none" and self.objective.supervised:
            raise ConfigError(
                f"algorithm.mismatch.weight={weight}: with algorithm.objective={self.objective.name} no "
                "engine has sampled the responses"
            )
        if weight != "none" and self.anchor == "engine":
            raise ConfigError(
                f"algorithm.mismatch.weight={weight} corrects for the engine's policy not being the anchor; "
                "with algorithm.anchor=engine it is the anchor"
            )
        return self

    @model_validator(mode="after")
    def _teacher_has_a_use(self) -> Self:
        name = self.objective.name
        if self.objective.distils and self.teacher is None:
            raise ConfigError(f"algorithm.objective={name} learns from a teacher: set algorithm.teacher.url")
        if self.teacher and self.objective.supervised:
            raise ConfigError(
                f"algorithm.teacher with algorithm.objective={name}: nothing is sampled that it could score; "
                "remove it, or set algorithm.objective=distillation"
            )
        if self.teacher and self.objective.distils and self.teacher.weight != 1.0:
            raise ConfigError(
                f"algorithm.teacher.weight={self.teacher.weight:g}: algorithm.objective={name} has no reward "
                "that it could weigh against; remove it, or set algorithm.objective=pmd"
            )
        return self

    def check(self, samples_per_prompt: int) -> None:
        """Raise ConfigError for a baseline that groups of this size do not have."""
        if self.baseline.endswith("_loo") and samples_per_prompt < 2:
            raise ConfigError(
                f"algorithm.baseline={self.baseline} leaves one response out: "
                "batch.samples_per_prompt must be at least 2"
            )


class Alarm(Frozen):
    threshold: PositiveFloat
    action: Literal["warn", "stop", "off"] = "warn"
    """`stop` ends the run after a checkpoint; the same command then goes on from there."""


class Alarms(Frozen):
    """What should make a person look at a run; compared after every iteration. They may change at a
    resume."""

    mismatch_growth: Alarm = Alarm(threshold=3.0)
    """Mean |log π_t − log π_b|, in units of its median so far."""
    mismatch_max: Alarm = Alarm(threshold=10.0)
    """Largest |log π_actor − log π_engine| of the rollout's tokens, nats."""
    progress: Alarm = Alarm(threshold=1.5)
    """PMD progress over the iteration's steps: over 1 the regression overshoots."""
    kl_jump: Alarm = Alarm(threshold=10.0)
    """KL(π_t ‖ π_θ) at the iteration's last step, in units of its median so far."""
    zero_advantage_groups: Alarm = Alarm(threshold=0.95)
    """Share of groups with equal rewards."""
    entropy_collapse: Alarm = Alarm(threshold=0.02)
    """Entropy per token, as a share of the first iteration's."""

    def thresholds(self) -> dict[str, float]:
        """Of the alarms that are on."""
        alarms = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: alarm.threshold for name, alarm in alarms.items() if alarm.action != "off"}

    def stops(self, name: str) -> bool:
        return getattr(self, name).action == "stop"
