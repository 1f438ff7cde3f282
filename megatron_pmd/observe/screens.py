"""The opening screen's numbers: a configuration worked out, before anything is started."""

from __future__ import annotations

from megatron_pmd.config import RunConfig

Rows = list[tuple[str, str]]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _objective(config: RunConfig) -> str:
    settings = config.algorithm.objective.model_dump(mode="json")
    return " ".join(str(value) if key == "name" else f"{key}={value}" for key, value in settings.items())


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size_rows(config: RunConfig) -> Rows:
    """Batch arithmetic, from a rollout down to a micro-batch."""
    batch = config.batch
    steps = batch.steps_per_rollout
    longest = batch.max_prompt_tokens + batch.max_response_tokens
    held = batch.max_tokens_per_microbatch // longest
    share = _ceil(batch.samples_per_step, config.layout.data)
    return [
        ("model", f"{config.model.path} ({config.model.precision})"),
        (
            "rollout",
            f"{batch.prompts_per_rollout:,} prompts x {batch.samples_per_prompt} = "
            f"{batch.samples_per_rollout:,} samples",
        ),
        (
            "update",
            f"{steps:,} steps of {batch.prompts_per_step:,} prompts = {batch.samples_per_step:,} samples",
        ),
        (
            "run",
            f"{config.iterations:,} iterations = {config.iterations * steps:,} steps, "
            f"{config.iterations * batch.samples_per_rollout:,} samples",
        ),
        (
            "sample",
            f"up to {batch.max_prompt_tokens:,} prompt + {batch.max_response_tokens:,} response = "
            f"{longest:,} tokens",
        ),
        (
            "micro-batch",
            f"up to {batch.max_tokens_per_microbatch:,} tokens, so at least {held:,} samples; at most "
            f"{_ceil(share, held):,} of them in a step on each replica",
        ),
        (
            "objective",
            f"{_objective(config)}, baseline {config.algorithm.baseline}, τ = {config.algorithm.tau:g}, "
            f"learning rate {config.optimizer.learning_rate:g}",
        ),
    ]


def layout_rows(config: RunConfig) -> Rows:
    """Which ranks hold what."""
    layout, batch = config.layout, config.batch
    requests = _ceil(batch.samples_per_rollout, config.engines)
    running = min(requests, config.rollout.max_running_requests)
    rows = [
        (
            "actor ranks",
            f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data} = {layout.ranks:,}",
        )
    ]
    if layout.expert > 1:
        replicas = layout.tensor * layout.data // (layout.expert * layout.experts_tensor)
        rows.append(
            (
                "experts",
                f"expert {layout.expert} x expert_tensor {layout.experts_tensor}: "
                f"{_many(replicas, 'replica')} in each pipeline stage",
            )
        )
    rows += [
        (
            "engines",
            f"{config.engines:,}, on {_many(config.ranks_per_engine, 'rank')} each, tensor parallel "
            f"{config.rollout.tensor_parallel}",
        ),
        ("per engine", f"{requests:,} samples a rollout, {running:,} at one time"),
    ]
    return rows
