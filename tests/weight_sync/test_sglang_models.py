"""What the loader has to make good in SGLang's own models; their code, without an engine."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_pmd.stubs import stub_path
from megatron_pmd.weight_sync import loader
from megatron_pmd.weight_sync.bucket import SharedBucket
from tests.weight_sync.filling import fill
from tests.weight_sync.test_bucket import Linear, deliver, verify

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the stand-ins for CUDA are for machines without it"
)


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    if not torch.cuda.is_available():
        sys.path.insert(0, str(stub_path()))
        yield
        sys.path.remove(str(stub_path()))


@pytest.fixture
def bucket(tmp_path: Path):
    bucket = SharedBucket("test", 1 << 16, folder=tmp_path)
    yield bucket
    bucket.close()
    loader._read_before.clear()


class Fp8Attention(Linear):
    """Scales of the KV cache are parameters of an FP8 model, which no checkpoint need have."""

    def __init__(self) -> None:
        from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod

        super().__init__()
        self.attn, self.method = torch.nn.Module(), BaseKVCacheMethod(None)
        self.method.create_weights(self.attn)


def test_full_verification_of_an_fp8_model_asks_for_no_scales_of_the_cache(bucket, tmp_path):
    assert verify(Fp8Attention(), bucket, tmp_path) is None


@pytest.mark.parametrize("left", [(-3.0, 2.0), (float("nan"), 0.5), (2.0, 2.0)])
def test_an_update_gives_the_cache_the_scales_that_a_release_lost(bucket, tmp_path, left):
    """SGLang looks at them when an update ends, and dies of an assertion at the first of these."""
    model = Fp8Attention()
    model.attn.k_scale.data.fill_(left[0])
    model.attn.v_scale.data.fill_(left[1])
    assert deliver(model, fill(bucket, {"a": torch.ones(4)}), tmp_path)["failures"] == [None]
    model.method.process_weights_after_loading(model.attn)
    assert (model.attn.k_scale_float, model.attn.v_scale_float) == (1.0, 1.0)


class Qwen3Moe(torch.nn.Module):
    """Two parameters, filled by SGLang's Qwen3-MoE."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_experts=2)
        self.model = torch.nn.Module()
        self.model.norm = torch.nn.LayerNorm(4, bias=False)

    def load_weights(self, weights):
        from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM

        with torch.no_grad():
            Qwen3MoeForCausalLM.load_weights(self, weights)


def test_a_tensor_that_qwen3_moe_drops_without_a_word_is_an_error_by_name(bucket, tmp_path):
    model, norm = Qwen3Moe(), {"model.norm.weight": torch.full((4,), 2.0)}
    assert deliver(model, fill(bucket, norm), tmp_path)["failures"] == [None]
    assert model.model.norm.weight.tolist() == [2.0] * 4
    error = deliver(model, fill(bucket, norm | {"model.nrom.weight": torch.ones(4)}), tmp_path)["failures"][0]
    assert "no place for 1 of its tensors" in error and "model.nrom.weight" in error
