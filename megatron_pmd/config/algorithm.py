"""Settings of the mathematics: objective, baseline, τ, corrections, and what raises an alarm."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from megatron_pmd.config.data import Source
from megatron_pmd.config.frozen import Frozen
from megatron_pmd.errors import ConfigError

Objective = Literal["pmd", "pmd_token", "reinforce", "grpo", "gspo", "cispo", "sft"]
Baseline = Literal["mean", "mean_loo", "partition", "partition_loo"]
Normaliser = Literal["response", "max_response", "none"]
MismatchName = Literal[
    "none", "sequence_tis", "geometric_tis", "sequence_mis", "token_veto", "token_tis", "token_mis"
]

COUNT_TOKENS = ("pmd_token", "grpo", "cispo", "sft")
"""Objectives that are means over tokens; the others are means over sequences."""
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
    lowest: PositiveFloat = 1e-4
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


class PmdToken(Frozen):
    log_ratio_low: float = Field(-1.0, le=0)
    """A token whose log π_θ/π_t is under this is dropped; nats. The paper names no bounds."""
    log_ratio_high: float = Field(1.0, ge=0)


class Grpo(Frozen):
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: PositiveFloat = 0.28
    kl_coefficient: NonNegativeFloat = 0.0
    """β of the k3 estimate of KL(π_θ ‖ π_t)."""
    divide_by_deviation: bool = False
    """Advantages over the standard deviation of their group's rewards."""


class Gspo(Frozen):
    clip_low: float = Field(3e-4, gt=0, lt=1)
    clip_high: PositiveFloat = 4e-4


class Cispo(Frozen):
    ratio_low: NonNegativeFloat = 0.0
    ratio_high: PositiveFloat = 5.0


class Ptx(Frozen):
    weight: PositiveFloat
    """λ: the mean next-token loss of the examples times λ is added to every optimizer step's loss."""
    source: Source
    """Problems whose answers are the responses to learn."""
    examples_per_step: PositiveInt


class Algorithm(Frozen):
    objective: Objective = "pmd"
    """`pmd` is this project's; the others are there to compare it with. `sft` trains on the problems'
    answers."""
    baseline: Baseline = "mean"
    """`mean` is PMD-mean (Kimi K1.5/K2); see docs/algorithm.md."""
    tau: PositiveFloat = 0.1
    """Regularisation strength τ, in reward units."""
    tau_schedule: Schedule | None = None
    """τ over the iterations, from algorithm.tau."""
    normaliser: Normaliser = "response"
    """pmd, reinforce: what a sequence's loss is divided by: its own counted tokens, max_response_tokens,
    or 1."""
    scaling: Literal["gradient", "regression"] = "gradient"
    """pmd: `gradient`, (τ/2)(s − A/τ)²; `regression`, ½(s − A/τ)², the same at 1/τ times the learning
    rate."""
    anchor: Literal["trainer", "engine"] = "trainer"
    """Whose log-probabilities are log π_t: recomputed by the actor, or the engines' own (saves a forward
    pass)."""
    mismatch: MismatchWeight = MismatchWeight()
    pmd_token: PmdToken = PmdToken()
    grpo: Grpo = Grpo()
    gspo: Gspo = Gspo()
    cispo: Cispo = Cispo()
    ptx: Ptx | None = None

    @model_validator(mode="after")
    def _used(self) -> Self:
        """Nothing is silent: a setting of another objective than the chosen one is an error."""
        only = dict(pmd_token=["pmd_token"], grpo=["grpo"], gspo=["gspo"], cispo=["cispo"])
        only |= dict(normaliser=["pmd", "reinforce"], scaling=["pmd"])
        for name, objectives in only.items():
            if (
                self.objective not in objectives
                and getattr(self, name) != type(self).model_fields[name].default
            ):
                raise ConfigError(
                    f"algorithm.{name} is a setting of {' and '.join(objectives)}, not of "
                    f"algorithm.objective={self.objective}"
                )
        self._check_mismatch()
        return self

    def _check_mismatch(self) -> None:
        weight = self.mismatch.weight
        if weight in (OF_SEQUENCES if self.objective in COUNT_TOKENS else OF_TOKENS):
            kind = "tokens" if self.objective in COUNT_TOKENS else "sequences"
            there = ("token_tis", "token_mis") if self.objective in COUNT_TOKENS else OF_SEQUENCES
            raise ConfigError(
                f"algorithm.mismatch.weight={weight} does not go with algorithm.objective={self.objective}, "
                f"a mean over {kind}; there are {', '.join(there)}, token_veto and none"
            )
        if weight != "none" and self.anchor == "engine":
            raise ConfigError(
                f"algorithm.mismatch.weight={weight} corrects for the engine's policy not being the anchor; "
                "with algorithm.anchor=engine it is the anchor"
            )

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
    progress: Alarm = Alarm(threshold=1.5)
    """PMD progress at the iteration's last step: over 1 the regression overshoots."""
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
