"""How long a sample may be in an engine: said before anything is started, by the settings' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_pmd.config import RunConfig
from megatron_pmd.data.tokenizer import check_model_folder
from megatron_pmd.errors import ConfigError


def check_lengths(config: RunConfig) -> None:
    """ConfigError for samples with more tokens than the model, as SGLang sees it, has positions.

    At the very limit SGLang cuts a response by two tokens, which it keeps aside
    (Scheduler.init_req_max_new_tokens).
    """
    folder = Path(config.model.path)
    positions = positions_of(check_model_folder(folder))
    option = config.rollout.sglang.get("context_length")
    limit = min(positions, option) if option and positions else positions or option
    batch = config.batch
    longest = batch.max_prompt_tokens + batch.max_response_tokens
    if limit and longest > limit:
        where = "rollout.sglang.context_length" if limit == option else f"{folder / 'config.json'}"
        raise ConfigError(
            f"batch.max_prompt_tokens={batch.max_prompt_tokens} + "
            f"batch.max_response_tokens={batch.max_response_tokens} are {longest} tokens, and the model has "
            f"{limit} positions ({where}): lower one of the two by {longest - limit}"
        )


def positions_of(described: dict[str, Any]) -> int | None:
    """Positions of the model that a config.json describes, as SGLang's get_context_length counts them."""
    rope = described.get("rope_scaling") or described.get("rope_parameters") or {}
    stretched = "original_max_position_embeddings" not in rope and rope.get("rope_type") != "llama3"
    positions = described.get("max_position_embeddings")
    return int(positions * (rope.get("factor") or 1 if stretched else 1)) if positions else None
