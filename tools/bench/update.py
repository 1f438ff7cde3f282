"""The sides of loop.py's update benchmark, each in its own processes and told over stdin when to run.

`ours` is one rank of the actor, under torchrun; `plain` is a training step as one writes it with transformers
alone: fp32 weights under autocast, AdamW, one padded batch. All take the same optimizer steps, or anchor
passes, on one rollout with the same loss, and answer a line `STEP VARIANT` on stdin with that step and a line
`rates A B C`: tokens per second, tokens per processor second, and the most memory that the step had resident,
bytes over all ranks. The end of stdin ends them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_pmd.algorithm.losses import Constants, Loss, LossInput, loss_of
from megatron_pmd.batch import RolloutBatch
from megatron_pmd.config import RunConfig, load
from megatron_pmd.errors import PmdError
from megatron_pmd.rollout_file import read_rollout
from megatron_pmd.training.subproblem import Subproblem

Rates = tuple[float, float, float]
"""Tokens per second, and per processor second; peak resident bytes."""
Step = Callable[[np.ndarray, str], tuple[float, int]]
"""A pass over these samples, in this variant; returns processor seconds and peak resident bytes."""
VARIANTS = {
    "ours": "ours", "plain": "plain", "plain_responses_only": "plain",
    "ours_anchor": "ours", "plain_anchor": "plain",
}  # fmt: skip
"""What is compared -> the processes that do it."""


def take_turns(config: RunConfig, turns: int, folder: Path, rollout: Path) -> dict[str, list[Rates]]:
    """The rates of each turn of each variant; all processes stay alive, and one at a time works."""
    (folder / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    ranks, threads = config.layout.ranks, config.actor.threads_per_rank
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    rates: dict[str, list[Rates]] = {variant: [] for variant in VARIANTS}
    with contextlib.ExitStack() as cleanup:
        sides = {
            "ours": cleanup.enter_context(_side("ours", torchrun, threads, folder, rollout)),
            "plain": cleanup.enter_context(_side("plain", [], ranks * threads, folder, rollout)),
        }
        for turn in range(turns):
            for variant, side in VARIANTS.items():
                rates[variant].append(sides[side](turn, variant))
    return rates


@contextlib.contextmanager
def _side(
    side: str, launcher: list[str], threads: int, folder: Path, rollout: Path
) -> Iterator[Callable[[int, str], Rates]]:
    """A side, waiting; calling what is given with a step and a variant returns the rates."""
    log = folder / f"{side}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *launcher, __file__, side, str(folder / "config.json"), str(rollout)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parents[2])},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    listening, answers = process.stdin, process.stdout

    def turn(number: int, variant: str) -> Rates:
        listening.write(f"{number} {variant}\n")
        listening.flush()
        for line in answers:
            if line.startswith("rates "):
                wall, processor, peak = map(float, line.split()[1:])
                return wall, processor, peak
        # torchrun's account of a rank's end is long and does not say why
        said = [
            line for line in log.read_text().splitlines() if "Error" in line and "ChildFailed" not in line
        ]
        raise PmdError(f"the side {side} of the update benchmark ended: " + "\n".join(said[-4:]))

    try:
        yield turn
    finally:
        with contextlib.suppress(BrokenPipeError):
            listening.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks
            process.wait()


def main(side: str, config_file: str, rollout_file: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = load(Path(config_file))
    samples, iteration = read_rollout(Path(rollout_file))
    Subproblem(config, iteration).compute_advantages(samples)
    batch = RolloutBatch.pack(samples, config.rollout.temperature)
    if side == "ours":
        ours(config, batch)
    else:
        serve(plain(config, batch), config, batch)


def steps_of(config: RunConfig, batch: RolloutBatch) -> list[np.ndarray]:
    """Sample indices of each optimizer step."""
    from megatron_pmd.actor.batching import steps_of_groups

    return steps_of_groups(batch.samples.groups, config.batch.prompts_per_step)


def serve(step: Step, config: RunConfig, batch: RolloutBatch) -> None:
    """Take a step for every line of stdin."""
    steps = steps_of(config, batch)
    while line := sys.stdin.readline():
        number, variant = line.split()
        samples = steps[int(number) % len(steps)]
        begun = time.perf_counter()
        used, peak = step(samples, variant)
        tokens = batch.samples.lengths[samples].sum()
        print(f"rates {tokens / (time.perf_counter() - begun)} {tokens / used} {peak}", flush=True)


class Used:
    """Processor seconds and peak resident memory of this process since it was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (man 5 proc)
        self._begun = time.process_time()

    def told(self) -> tuple[float, int]:
        used = time.process_time() - self._begun
        status = Path("/proc/self/status").read_text()
        return used, int(status.partition("VmHWM:")[2].split()[0]) * 1024


def ours(config: RunConfig, batch: RolloutBatch) -> None:
    """Every rank takes the steps together; the first listens."""
    if not torch.cuda.is_available():
        from megatron_pmd.actor.cpu import standins

        standins.install()
    from megatron_pmd.actor import parallel
    from megatron_pmd.actor.actor import Actor
    from megatron_pmd.distributed import Control

    parallel.initialize(config.layout, seed=config.seed, timeout_seconds=config.actor.timeout_seconds)
    control = Control(config.actor.timeout_seconds)
    actor = Actor(config, control)
    anchor = torch.from_numpy(batch.tokens.engine_log_probs)

    def step(samples: np.ndarray, variant: str) -> list[tuple[float, int]] | None:
        used = Used()
        microbatches = actor.microbatches(batch, samples)
        if variant == "ours_anchor":
            actor.log_probs(batch, microbatches)
        else:
            actor.update(batch, microbatches, anchor, pmd_loss(config), config.optimizer.learning_rate)
        return control.gather(used.told())

    if control.is_driver:

        def together(samples: np.ndarray, variant: str) -> tuple[float, int]:
            control.from_driver((samples, variant))
            seconds, peaks = zip(*(step(samples, variant) or ()), strict=True)
            return sum(seconds), sum(peaks)

        serve(together, config, batch)
        control.from_driver(None)
    else:
        while (order := control.from_driver()) is not None:
            step(*order)
    torch.distributed.destroy_process_group()


def pmd_loss(config: RunConfig) -> Loss:
    algorithm = config.algorithm
    return loss_of(algorithm.objective, Constants(config.batch.max_response_tokens))


def plain(config: RunConfig, batch: RolloutBatch) -> Step:
    """The pass in transformers; `plain_responses_only` computes the logits of the last tokens alone."""
    from transformers import AutoModelForCausalLM

    settings = config.optimizer
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon, weight_decay=settings.weight_decay,
    )  # fmt: skip
    together = config.layout.data * config.batch.max_tokens_per_microbatch

    def step(samples: np.ndarray, variant: str) -> tuple[float, int]:
        used = Used()
        train, responses_only = variant != "plain_anchor", variant == "plain_responses_only"
        rows = max(1, together // int(batch.samples.lengths[samples].max()))
        with torch.set_grad_enabled(train):
            for start in range(0, len(samples), rows):
                loss = _loss(model, config, batch, samples[start : start + rows], responses_only)
                if train:
                    (loss / len(samples)).backward()
        if train:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
        return used.told()

    return step


def _loss(
    model: torch.nn.Module, config: RunConfig, batch: RolloutBatch, samples: np.ndarray, responses_only: bool
) -> torch.Tensor:
    """The PMD loss of some samples, summed; padded on the left, so that all responses end together."""
    longest, responses = int(batch.samples.lengths[samples].max()), batch.samples.response_lengths[samples]
    tokens = torch.zeros((len(samples), longest), dtype=torch.int64)
    attended = torch.zeros_like(tokens)
    for row, s in enumerate(samples):
        length = int(batch.samples.lengths[s])
        tokens[row, longest - length :] = torch.from_numpy(
            batch.tokens.ids[batch.tokens.offsets[s] : batch.tokens.offsets[s + 1]]
        )
        attended[row, longest - length :] = 1
    kept = int(responses.max()) + 1 if responses_only else longest
    with torch.autocast("cpu", torch.bfloat16, enabled=config.model.precision == "bf16"):
        logits = model(input_ids=tokens, attention_mask=attended, logits_to_keep=kept).logits
    # column c of the logits predicts column c + 1 of the last `kept` tokens
    column = torch.arange(kept - 1)
    answered = column[None] >= kept - 1 - torch.from_numpy(responses)[:, None]
    targets = tokens[:, -(kept - 1) :][answered]
    scaled = logits[:, :-1][answered].float() / config.rollout.temperature
    log_probs = scaled.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    source = np.concatenate(
        [
            np.arange(batch.tokens.offsets[s] + batch.samples.prompt_lengths[s], batch.tokens.offsets[s + 1])
            for s in samples
        ]
    )
    anchor = torch.from_numpy(batch.tokens.engine_log_probs[source])
    terms = pmd_loss(config)(
        LossInput(
            log_probs=log_probs,
            anchor_log_probs=anchor,
            engine_log_probs=anchor,
            mask=torch.ones_like(log_probs),
            sequence=torch.repeat_interleave(torch.arange(len(samples)), torch.from_numpy(responses)),
            advantages=torch.from_numpy(batch.samples.advantages[samples]).float(),
            tau=torch.from_numpy(batch.samples.taus[samples]),
        )
    )
    return terms.sum


if __name__ == "__main__":
    main(*sys.argv[1:])
