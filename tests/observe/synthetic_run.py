"""A run directory as a small run leaves it, made by the journal and the rollout writer themselves."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np

from megatron_pmd.batch import Sample
from megatron_pmd.config import RunConfig, build
from megatron_pmd.observe.journal import Journal
from megatron_pmd.rollout_file import write_rollout

STEPS = 4
HOSTILE = (
    '</script><script>document.title="owned"</script><img src=x onerror="alert(1)"> <!-- {{ 7 * 7 }} '
    "[bold]markup[/bold] \x1b[31m"
)
PHASES = (
    ("rollout", None),
    ("release", None),
    ("anchor", None),
    ("update", None),
    ("save", 1_600_000_000),
    ("sync", 270_000_000),
    ("resume", None),
)


def make_config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "synthetic",
        "iterations": 6,
        "model": {"path": "models/tiny", "precision": "fp32"},
        "layout": {"tensor": 2, "expert": 2, "data": 2},
        "batch": {
            "prompts_per_rollout": 16,
            "samples_per_prompt": 4,
            "prompts_per_step": 4,
            "max_tokens_per_microbatch": 4096,
            "max_prompt_tokens": 256,
            "max_response_tokens": 768,
        },
        "optimizer": {"learning_rate": 1e-5},
        "data": {"train": {"kind": "reasoning_gym", "task": "chain_sum", "size": 1000}},
        "reward": {"name": "exact"},
    }
    return build(values | changes)


def make_samples(t: int, groups: int = 16, per_group: int = 4, extra: str = "") -> list[Sample]:
    draw = random.Random(t)
    samples = []
    for group in range(groups):
        a, b = 10 + 3 * group, 7 + group
        for number in range(per_group):
            right = draw.random() < 0.2 + 0.12 * t
            text = f"First {a} + {b}. Adding the tens and then the units gives {a + b + (not right)}." + extra
            samples.append(
                Sample(
                    group=group,
                    number=number,
                    problem=100 + group,
                    prompt=f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n",
                    response=text,
                    answer=str(a + b),
                    prompt_tokens=np.arange(1, 4),
                    response_tokens=np.arange(40 + number),
                    engine_log_probs=np.full(40 + number, -0.1),
                    finish_reason="stop" if number else "length",
                    weight_version=t,
                    seed=number,
                    reward=float(right),
                    advantage=float(right) - 0.5,
                )
            )
    return samples


def log_evaluation(journal: Journal, t: int, extra: str = "") -> None:
    write_rollout(journal.folder / f"evaluations/{t}.parquet", make_samples(t, 12, 2, extra), t)
    score = 0.2 + 0.06 * t
    journal.log(
        "evaluation",
        {"k": 2, "prompts": 12, "mean_at_k": score, "pass_at_k": score + 0.15, "response_tokens": 44.0 + t},
    )


def log_iteration(journal: Journal, t: int, extra: str = "") -> None:
    """Everything a loop would write in iteration t."""
    for name, moved in PHASES:
        with journal.phase(name) as phase:
            phase.bytes, phase.actor_bytes, phase.engine_bytes = moved, 900_000_000, 700_000_000
    write_rollout(journal.folder / f"rollouts/{t}.parquet", make_samples(t, extra=extra), t)
    for step in range(STEPS):
        n = t * STEPS + step
        journal.log(
            "step",
            {
                "step": step,
                "global_step": n,
                "loss": 0.9 * math.exp(-n / 10),
                "gradient_norm": 1.2 + 0.4 * math.sin(n),
                "learning_rate": 1e-5,
                "pmd/progress": 0.05 * step,
                "pmd/kl_anchor_k3": 0.002 * step**2,
                "mismatch/mean_abs": 2e-6 * (1 + step),
            },
        )
    journal.log(
        "iteration",
        {
            "weight_version": t,
            "reward": 0.2 + 0.06 * t,
            "response_tokens": 41.5,
            "truncated_share": 0.25,
            "reward_errors": 0,
            "rollout/tokens_per_second": 310.0 + t,
            "update/tokens_per_second": 120.0,
            "sync/mean_abs_difference": 3e-7,
        },
    )


def run_iterations(journal: Journal, first: int, stop: int, extra: str = "") -> None:
    for t in range(first, stop):
        journal.iteration(t)
        if t % 3 == 0:
            with journal.phase("evaluate"):
                log_evaluation(journal, t, extra)
        log_iteration(journal, t, extra)
