"""Every text family that Megatron-Bridge maps and transformers knows: computed as there, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_pmd.actor import families
from megatron_pmd.convert import precision
from megatron_pmd.hugging_face import TensorFiles
from tests.actor.family_models import MODELS, OTHER_LAYOUTS, write_family, write_quantized, write_refused
from tests.actor.launch import launch
from tests.actor.reference import Reference
from tests.actor.tiny_models import FAMILIES
from tools.write_model_table import PAGE, page

pytestmark = pytest.mark.slow

RANKS = (1, 2)
OTHERWISE = {f"{kind}, otherwise": kind for kind in OTHER_LAYOUTS}
CASES = [(ranks, kind, kind) for ranks in RANKS for kind in MODELS]
CASES += [(2, kind, name) for name, kind in OTHERWISE.items()]
"""Ranks, family, and how the results are called."""


def program(name: str, ranks: int = 1, **arguments: Any) -> list[Any]:
    return launch(name, ranks=ranks, module="tests.actor.family_programs", **arguments)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for kind in MODELS:
        write_family(root / kind, kind)
    return root


@pytest.fixture(scope="module")
def results(folders: Path) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks, every rank's results."""
    one: dict[str, Any] = {kind: (folders / kind, {}) for kind in MODELS}
    two = {kind: (folders / kind, layout) for kind, (_, _, layout) in MODELS.items()}
    two |= {name: (folders / kind, OTHER_LAYOUTS[kind]) for name, kind in OTHERWISE.items()}
    return {ranks: program("families", ranks, cases=cases) for ranks, cases in ((1, one), (2, two))}


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def reference(kind: str, folders: Path) -> Reference:
    return torch.load(folders / kind / "reference.pt", weights_only=False)


@pytest.mark.parametrize(("ranks", "kind", "name"), CASES)
def test_log_probs_are_those_of_transformers(ranks, kind, name, results, reference):
    whole = torch.full_like(reference.anchor, torch.nan)
    for rank in (result[name] for result in results[ranks]):
        own = ~rank["log_probs"].isnan()
        if rank["holds_logits"]:
            whole[own] = rank["log_probs"][own]
    parts = [[torch.nan] * len(s.prompt_tokens) + s.engine_log_probs.tolist() for s in reference.samples]
    expected = torch.tensor([value for part in parts for value in part])
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("ranks", "kind", "name"), CASES)
def test_loss_and_whole_gradient_of_a_step_are_those_of_autograd_in_float64(
    ranks, kind, name, results, reference
):
    found, (expected,) = [result[name] for result in results[ranks]], reference.steps
    loss, count = (sum(rank["step"][i] for rank in found) for i in (0, 1))
    assert loss / count == pytest.approx(expected.loss, rel=1e-5)
    gradient = found[0]["gradient"]
    assert expected.gradient.keys() <= gradient.keys()
    errors = {
        tensor: float((gradient[tensor].double() - own).norm() / own.norm())
        for tensor, own in expected.gradient.items()
    }
    assert max(errors.values()) < 1e-5, errors


def test_a_folder_comes_back_byte_for_byte(kind, folders, results):
    held = load_file(folders / kind / "model.safetensors")
    exported = results[1][0][kind]["exported"]
    assert exported.keys() == held.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in held.items())


OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v2, groups": dict(topk_method="group_limited_greedy"),
    "gemma3_text, capped": dict(final_logit_softcapping=30.0),
}
"""Configurations of families that work, which are refused."""


@pytest.fixture(scope="module")
def quantized(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Kimi-K2 as it is published, in FP8, and what its matrices stand for."""
    folder = tmp_path_factory.mktemp("quantized") / "kimi_k2"
    return folder, write_quantized(folders / "kimi_k2", folder)


@pytest.fixture(scope="module")
def refused(folders: Path, quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    root = tmp_path_factory.mktemp("refused")
    for kind in families.REFUSED:
        write_refused(root / kind, kind, CLASSES[kind])
    write_refused(root / "qwen2_5_vl", "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")
    for name, changes in OTHERS.items():
        kind = name.partition(",")[0]
        write_refused(root / name, kind, CLASSES[kind], **changes)
    layouts = {f"{kind}, tensor=2": (folders / kind, dict(tensor=2)) for kind in families.NORMS_OF_ALL_HEADS}
    layouts |= {f"{kind}, context=2": (folders / kind, dict(context=2)) for kind in families.POST_NORMS}
    named = {folder.name: folder for folder in root.iterdir()}
    return program("refusals", folders=named, layouts=layouts, quantized=quantized[0])[0]


@pytest.mark.parametrize("kind", families.REFUSED)
def test_a_family_that_is_not_compared_is_refused_with_the_reason(kind, refused):
    error, message = refused["said"][kind]
    assert error == "ModelError" and f"models of type {kind} are refused: " in message
    assert families.REFUSED[kind] in message


def test_every_text_family_that_megatron_bridge_maps_and_transformers_knows_is_in_one_of_the_lists(refused):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    listed = families.PROVEN.keys() | families.REFUSED.keys()
    assert not families.PROVEN.keys() & families.REFUSED.keys()
    text = [name for name in refused["known"] if name.endswith("ForCausalLM")]
    kinds = {name: {kind for kind, own in CLASSES.items() if own == name} for name in text}
    assert sum(map(bool, kinds.values())) > 25
    assert [name for name, own in kinds.items() if own and not own & listed] == []


def test_the_actor_and_a_conversion_read_published_fp8_within_the_rounding_of_bf16(quantized, refused):
    """bf16 has 7 bits behind the leading one: half a step is 2^-8. What is not FP8 stays as it is."""
    folder, meant = quantized
    files, held = TensorFiles(folder), refused["read from FP8"]
    assert len(meant) > 20 and held.keys() == {n for n in files.tensors if not n.endswith("_scale_inv")}
    for name, tensor in held.items():
        if name not in meant:
            assert torch.equal(tensor, files.get(name))
            continue
        for read in (tensor, precision.plain(name, files)):
            error = np.abs(read.double().numpy() - meant[name])
            assert (error <= 2.0**-8 * 1.0001 * np.abs(meant[name])).all(), name


def test_transformers_does_not_know_kimi_k2():
    """When this fails, families.know_kimi is no longer needed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert "kimi_k2" not in CONFIG_MAPPING_NAMES


def test_a_model_of_images_is_refused(refused):
    error, message = refused["said"]["qwen2_5_vl"]
    assert error == "ModelError" and "nobody has compared its logits" in message


def test_settings_under_which_a_family_would_be_computed_wrongly_are_refused(refused):
    error, message = refused["said"]["deepseek_v2, groups"]
    assert error == "ModelError" and "topk_method=group_limited_greedy" in message
    error, message = refused["said"]["gemma3_text, capped"]
    assert error == "ModelError" and "final_logit_softcapping=30.0 in config.json" in message
    for kind in families.NORMS_OF_ALL_HEADS:
        error, message = refused["said"][f"{kind}, tensor=2"]
        assert error == "LayoutError" and "normalises the queries of all heads at once" in message
    for kind in families.POST_NORMS:
        error, message = refused["said"][f"{kind}, context=2"]
        assert error == "LayoutError" and "layers whose attention sees a window" in message


def test_every_family_that_works_is_compared_here_or_with_four_layers():
    from tools.write_model_table import OF_FOUR_LAYERS

    assert MODELS.keys() | OF_FOUR_LAYERS.keys() == families.PROVEN.keys()
    assert {family for own in OF_FOUR_LAYERS.values() for family in own} == FAMILIES.keys()


def test_the_page_is_the_one_that_these_lists_make():
    assert PAGE.read_text() == page(), "run `make docs`"
