"""Optimizers whose parts megatron-core and Transformer Engine mark and count otherwise on a device."""

from __future__ import annotations

from megatron_pmd.config import override
from tests.actor.tiny_models import config_for
from tests.gpu_emulated.comparing import assert_resumes_bit_for_bit
from tests.gpu_emulated.launch import launch
from tests.gpu_emulated.settings import config


def test_a_run_that_is_saved_before_its_first_step_takes_the_same_steps_after_it(models, tmp_path):
    """Of Transformer Engine's Adam there is no state by then."""
    settings = ("bf16", "bf16 moments", "the optimizer on the host", "half of the optimizer on the host")
    configs = {name: config(models, "dense for fp8", name) for name in settings}
    configs["fp32"] = config_for(models / "qwen2")
    configs["muon"] = override(configs["bf16"], ["optimizer.name=muon"])
    cases = {name: (each, tmp_path / name) for name, each in configs.items()}
    for result in launch("save_at_once", cases=cases)[0].values():
        assert_resumes_bit_for_bit(result)


def test_both_halves_of_the_optimizer_go_on_counting_after_a_resume_and_begin_anew_after_a_reset(
    models, tmp_path
):
    half = config(models, "dense for fp8", "half of the optimizer on the host")
    (result,) = launch("go_on_twice", config=half, folder=tmp_path)
    assert_resumes_bit_for_bit(result)
    assert result["counts"] == [{1.0}, {1.0}]


def test_muon_takes_latent_attentions_projections_down_for_whole_matrices(models):
    """Transformer Engine calls them parts of dimension 0, here as without Muon."""
    adam = config_for(models / "latent for fp8", dict(tensor=2), precision="bf16")
    configs = {"adam": adam, "muon": override(adam, ["optimizer.name=muon"])}
    for found in launch("partition_dimensions", ranks=2, configs=configs):
        assert len(found["adam"]) >= 2 and set(found["adam"].values()) == {0}
        assert set(found["muon"].values()) == {-1}
