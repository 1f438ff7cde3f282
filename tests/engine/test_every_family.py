"""An engine on the CPU for each family that no test of the default suite serves: it takes 30 s a family.

Each model is converted there and back first: the engine reads a folder that this project wrote.

Run by name alone: `pytest tests/engine/test_every_family.py`. docs/models.md is written from the lists below.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_pmd.convert.side_files import in_both_words
from megatron_pmd.engine import sglang_server
from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.families import NEEDS_GPUS, NO_ENGINE
from megatron_pmd.engine.keys import Keys
from megatron_pmd.engine.sglang_server import EngineProcess
from megatron_pmd.errors import EngineError
from megatron_pmd.weight_sync.bucket import SharedBucket
from tests.actor.family_models import MODELS, write_model_of
from tests.actor.launch import launch
from tests.actor.tiny_models import FAMILIES, write_model
from tests.convert.command_line import tensors
from tests.convert.conftest import PROGRAMS
from tests.engine.live_engine import ADMIN_KEY, KEY, generate, largest_difference, spec_for
from tests.weight_sync.filling import fill

pytestmark = pytest.mark.slow

SERVED = frozenset({"gemma3_text", "glm4_moe", "hy_v3", "qwen2"})
"""model_type of families whose engine, given the actor's tensors, computes what transformers does."""
OTHERWISE = {
    "gemma": "SGLang computes the exact GELU, transformers its approximation",
    "gemma2": "SGLang's attention for CPUs leaves out the cap of scores",
    "olmoe": "SGLang takes 1e-5 for `rms_norm_eps`, whatever config.json says",
    "mistral": "SGLang ignores `sliding_window`",
}
"""Families of which an engine computes something else, and why."""
_LATENT = "Expected size for first two dimensions of batch2"
DIES_WITH = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "exaone4": "is required for Exaone4ForCausalLM",
    "exaone_moe": "is required for ExaoneMoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM requires one of",
    "minimax_m2": "assert x1.is_cuda",
    "nemotron": "'NoneType' object is not subscriptable",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM has no SGlang implementation",
    "qwen3_5_text": "Qwen3_5ForCausalLM has no SGlang implementation",
    "qwen3_next": "No module named 'sgl_kernel.mamba'",
}
"""Families of which no engine starts: what its log ends with. engine/families.py has the reasons."""
START_SECONDS = 600.0


def started(folder: Path, model: Path) -> EngineProcess:
    engine = EngineProcess(spec_for(model, folder, keys=Keys(KEY, ADMIN_KEY)))
    try:
        engine.wait_ready(START_SECONDS)
    except EngineError:
        engine.stop()
        raise
    return engine


def written(kind: str, folder: Path) -> Path:
    four_layers = {"deepseek_v3": "deepseek"}.get(kind, kind)
    if four_layers in FAMILIES:
        write_model(folder, four_layers, num_hidden_layers=2)
    else:
        write_model_of(folder, kind)
    return folder


def exported(model: Path, folder: Path) -> Path:
    """The model as a checkpoint, and as a folder again."""
    launch("round_trips", module=PROGRAMS, cases=[(model, folder, None)], verified=([], []))
    return folder / "hf"


@pytest.mark.parametrize("kind", sorted([*SERVED, *OTHERWISE]))
def test_an_engine_computes_what_transformers_does_or_is_known_not_to(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model = written(kind, tmp_path / "model")
    # transformers' default attention leaves out a cap of scores, as the engine's does
    theirs = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    export = exported(model, tmp_path / "converted")
    engine, bucket = started(tmp_path, export), SharedBucket(f"family-{os.getpid()}", 1 << 23)

    def update(factor: float) -> None:
        weights = {name: tensor * factor for name, tensor in tensors(export).items()}
        control.begin_update()
        control.load_bucket([fill(bucket, weights)])
        control.end_update(1)
        control.flush_cache()

    try:
        with EngineControl(engine.spec, timeout_seconds=60) as control:
            update(1.0)
            pushed = largest_difference(theirs, generate(engine.spec.url))
            update(0.5)  # so that what comes from disk shows
            control.load_from_disk(export)
            control.flush_cache()
            read = largest_difference(theirs, generate(engine.spec.url))
    finally:
        engine.stop()
        bucket.close()
    assert [difference < 1e-4 for difference in (pushed, read)] == [kind in SERVED] * 2, (pushed, read)


@pytest.mark.parametrize("kind", DIES_WITH)
def test_an_engine_of_a_family_that_is_refused_would_die_at_its_start(kind, tmp_path, monkeypatch):
    """When one starts, it is refused no more: it belongs to another list."""
    monkeypatch.setattr(sglang_server, "check_served", lambda path, cpu: None)
    model = written(kind, tmp_path / "model")
    config = in_both_words(json.loads((model / "config.json").read_text()))
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError) as failure:
        started(tmp_path, model)
    assert DIES_WITH[kind] in str(failure.value) + (tmp_path / "logs" / "engine-3.log").read_text()


def test_every_family_is_in_one_of_the_lists_at_most():
    listed = [*SERVED, *OTHERWISE, *NEEDS_GPUS, *NO_ENGINE]
    assert len(listed) == len({*listed}) and {*listed} <= {*MODELS, *FAMILIES, "deepseek_v3"}
    # kimi_k2 is the deepseek_v3 under another name
    assert DIES_WITH.keys() == (NEEDS_GPUS | NO_ENGINE).keys() - {"kimi_k2"}
