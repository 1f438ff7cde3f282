"""Which kernel Transformer Engine chooses for the rows that an actor packs, on Hopper.

Whether cuDNN has it for a shape, cuDNN says of a device: that question is answered with yes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch._subclasses import fake_tensor
from transformer_engine.pytorch.attention.dot_product_attention import utils

from megatron_pmd.actor.packing import PackedMicrobatch
from megatron_pmd.config import RunConfig
from tests.gpu_contract.meta_stage import as_rank, stage_of
from tests.gpu_contract.model_folders import configured, trained_alike

SEQUENCES = (5120, 2048, 1024)
"""Tokens of each sequence of a row, the last one padding."""


class Chosen(Exception):
    """Carries out of the layer what get_attention_backend answered; no kernel follows."""


@pytest.fixture
def answered(monkeypatch):
    """The layer asks Transformer Engine, of plain tensors, and no further."""
    ask = utils.get_attention_backend

    def ask_and_stop(parameters: Any) -> Any:
        asked = dataclasses.replace(parameters, qkv_type=torch.Tensor)
        raise Chosen(asked, ask(asked))

    monkeypatch.setattr(utils, "get_attention_backend", ask_and_stop)
    kernel = int(utils.FusedAttnBackend.F16_arbitrary_seqlen)
    monkeypatch.setattr(utils, "_get_fused_attn_backend", lambda **_: (kernel, ""))
    # a fake tensor on CUDA first makes a real one, where torch.cuda says that it is available
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)


def chosen_by(config: RunConfig, *, training: bool) -> tuple[Any, Any]:
    """(what the attention layer asked for, what it was answered) for a packed row of this recipe."""
    with as_rank(0, config.layout):
        _, provider, stage = stage_of(config)
        decoder: Any = stage.decoder
        layer = decoder.layers[0].self_attention.core_attention
        layer.train(training)
        bounds = [0, *torch.tensor(SEQUENCES).cumsum(0).tolist()]
        tokens, width = bounds[-1], config.layout.tensor
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            row = PackedMicrobatch(
                samples=[], tokens=torch.empty(0), positions=torch.empty(0),
                bounds=torch.empty(len(bounds), dtype=torch.int32), rows=torch.empty(0), here=torch.empty(0),
                targets=torch.empty(0), sequence=torch.empty(0), source=torch.empty(0),
                longest=max(SEQUENCES), experts=None, supervised=False,
            )  # fmt: skip
            heads = provider.num_attention_heads // width
            # latent attention has as many keys as queries
            groups = heads if provider.multi_latent_attention else provider.num_query_groups // width
            here = tokens // config.layout.context
            keys = layer.hidden_size_per_attention_head_k
            values = layer.hidden_size_per_attention_head_v
            query, key, value = (
                torch.empty(here, number, size, dtype=torch.bfloat16, requires_grad=training)
                for number, size in ((heads, keys), (groups, keys), (groups, values))
            )
            with pytest.raises(Chosen) as chosen:
                layer(query, key, value, None, AttnMaskType.causal, packed_seq_params=row.attention)
    return chosen.value.args


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("name", trained_alike())
def test_packed_rows_get_the_fused_attention_of_cudnn_in_both_directions(name, context, models, answered):
    config = configured(name, models)
    data = max(1, config.layout.data // context)
    batch = config.batch
    longest = batch.max_prompt_tokens + batch.max_response_tokens
    row = max(
        batch.max_tokens_per_microbatch, -(-longest // context)
    )  # the recipe may share it among more ranks
    config = configured(
        name, models, f"layout.context={context}", f"layout.data={data}",
        f"batch.max_tokens_per_microbatch={row}",
    )  # fmt: skip
    for training in (True, False):
        asked, (flash, _, fused, kernel, _, _) = chosen_by(config, training=training)
        assert asked.qkv_layout == "thd_thd_thd" and asked.attn_mask_type == "padding_causal"
        assert asked.context_parallel == (context > 1) and asked.is_training == training
        assert fused and not flash, f"training={training}: flash={flash} fused={fused}"
        assert kernel == utils.FusedAttnBackend.F16_arbitrary_seqlen
