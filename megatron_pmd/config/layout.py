"""The layout: how the model and the batch are shared out over ranks."""

from __future__ import annotations

from typing import Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from megatron_pmd.config.frozen import Frozen
from megatron_pmd.errors import LayoutError


class Layout(Frozen):
    tensor: PositiveInt = 1
    """Also shards the activations between tensor-parallel layers (sequence parallelism)."""
    context: PositiveInt = 1
    """Ranks that share out the tokens of every sequence."""
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Chunks of layers a pipeline stage holds; more than 1 interleaves them, which shortens the bubble."""
    expert: PositiveInt = 1
    expert_tensor: PositiveInt | None = None
    """Tensor-parallel size inside an expert; None: 1 with expert parallelism, else `tensor`."""
    data: PositiveInt = 1
    """Data-parallel replicas of the dense layers; the experts' replicas follow from it."""
    engine_nodes: NonNegativeInt = 0
    """Nodes of the job beside those of the ranks, with engines alone: equal shares of them all. 0: engines
    are on the nodes of their ranks. For rollout.placement=separate (docs/overlap.md)."""

    @property
    def ranks_per_stage(self) -> int:
        return self.tensor * self.context * self.data

    @property
    def ranks(self) -> int:
        return self.ranks_per_stage * self.pipeline

    @property
    def sequence_multiple(self) -> int:
        """Sequences are padded to a multiple of this: each context rank holds two of 2·context chunks."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def experts_tensor(self) -> int:
        return self.expert_tensor or (1 if self.expert > 1 else self.tensor)

    def check_model(
        self,
        model: str,
        *,
        heads: int,
        vocabulary: int,
        key_value_heads: int | None,
        experts: int | None,
        linear_key_heads: int | None = None,
        layers: tuple[int, str, int] | None = None,
    ) -> None:
        """Raise LayoutError naming the first thing of the model that the layout does not divide.

        key_value_heads  None with latent attention, which has none
        experts          None or 0 for a dense model
        linear_key_heads of linear attention, which context-parallel ranks share out too
        layers           (how many, setting that divides them, its value), where they are dealt out evenly
        """
        # the vocabulary is not padded: a row more would be a token that no tokenizer has
        rules = [
            ("attention heads", heads, "tensor", self.tensor),
            ("rows of the vocabulary", vocabulary, "tensor", self.tensor),
        ]
        if layers is not None:
            rules.append(("layers", *layers))
        if key_value_heads is not None:
            rules.append(("key-value heads", key_value_heads, "tensor", self.tensor))
        if linear_key_heads is not None:
            ranks = self.tensor * self.context
            rules.append(("key heads of linear attention", linear_key_heads, "tensor x context", ranks))
        if experts:
            rules.append(("experts", experts, "expert", self.expert))
        elif self.expert > 1:
            raise LayoutError(f"layout.expert={self.expert}, but {model} has no experts")
        for what, count, key, size in rules:
            if count % size:
                raise LayoutError(f"layout.{key}={size} does not divide the {count} {what} of {model}")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise LayoutError(
                f"layout: virtual_pipeline={self.virtual_pipeline} interleaves the stages of a pipeline; "
                "with pipeline=1 there is one stage"
            )
        if self.ranks_per_stage % (self.expert * self.experts_tensor):
            raise LayoutError(
                f"layout: tensor={self.tensor} x context={self.context} x data={self.data} "
                f"({self.ranks_per_stage} ranks a pipeline stage) cannot hold expert={self.expert} x "
                f"expert_tensor={self.experts_tensor}; choose them so that they divide {self.ranks_per_stage}"
            )
        if self.expert == 1 and self.experts_tensor != self.tensor:
            raise LayoutError(
                f"layout: expert_tensor={self.experts_tensor} without expert parallelism must be "
                f"tensor={self.tensor}: megatron-core would not sum the experts' gradients over the "
                "tensor-parallel ranks"
            )
        return self
