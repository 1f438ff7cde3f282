"""The lists of families agree with each other, with transformers, and with docs/models.md."""

from __future__ import annotations

import pytest

from megatron_pmd.actor import families
from tests.actor.family_models import MODELS
from tests.actor.tiny_models import FAMILIES
from tools.write_model_table import OF_FOUR_LAYERS, PAGE, layouts_of, page


def test_transformers_does_not_know_kimi_k2():
    """When this fails, families.know_kimi is no longer needed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert "kimi_k2" not in CONFIG_MAPPING_NAMES


def test_every_family_that_works_is_compared_here_or_with_four_layers():
    assert MODELS.keys() | OF_FOUR_LAYERS.keys() == families.PROVEN.keys()
    assert {family for own in OF_FOUR_LAYERS.values() for family in own} == FAMILIES.keys()


@pytest.mark.parametrize("kind", families.PROVEN)
def test_each_family_is_compared_under_tensor_and_pipeline_and_each_mixture_under_expert_parallelism(kind):
    """OLMoE and MiniMax-M2 refuse tensor parallelism."""
    settings = [MODELS[kind][1]] if kind in MODELS else [FAMILIES[own][1] for own in OF_FOUR_LAYERS[kind]]
    wanted = {"pipeline"} if kind in families.NORMS_OF_ALL_HEADS else {"tensor", "pipeline"}
    wanted |= {"expert"} if "num_experts_per_tok" in settings[0] else set()
    assert wanted <= {key for layout in layouts_of(kind) for key in layout}


def test_the_page_is_the_one_that_these_lists_make():
    assert PAGE.read_text() == page(), "run `make docs`"
