"""Write docs/proofs.md, and the short table in README.md, from what the tests are parametrised with.

    python -m tools.write_proof_table

A mark stands for a test that runs on that family. Families and layouts are the tests' own lists, imported: a
test that loses a case loses its mark here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_pmd.actor.families import PROVEN
from megatron_pmd.planner.shapes import MODELS
from recipes import recipe
from tests.actor import (
    test_checkpoint,
    test_layout_conversion,
    test_layouts,
    test_logits,
    test_routing_replay,
)
from tests.actor.conftest import LAYOUTS, ranks_of
from tests.actor.test_checkpoint import OTHER_LAYOUTS
from tests.actor.test_routing_replay import SINGLE, TWO_RANKS
from tests.actor.tiny_models import FAMILIES
from tests.convert import test_real_model, test_round_trip
from tests.convert.conftest import VARIANTS, VERIFIED
from tests.end_to_end import command_line, test_live_run, test_replay_and_resume
from tests.launch import test_script
from tests.planner import test_planning
from tests.weight_sync import test_nodes, test_shards, test_two_engines

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "proofs.md"
README = ROOT / "README.md"
MARKS = ("<!-- proofs: written by make docs -->", "<!-- /proofs -->")
NAMES = {
    "llama": "Llama",
    "llama3": "Llama 3 (scaled rotary embedding)",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3moe": "Qwen3-MoE",
    "moonlight": "Moonlight (latent attention)",
    "deepseek": "DeepSeek-V3, Kimi-K2 (latent attention)",
}
KINDS = ("tensor", "context", "pipeline", "virtual_pipeline", "expert", "expert_tensor", "data")
"""Kinds of parallelism, by their key under `layout`."""
YES, NO, NOT_APPLICABLE = "✓", "–", ""


@dataclass(frozen=True)
class Proof:
    """One column: what is compared, by which tests, on which families."""

    title: str
    what: str
    tests: tuple[Callable[..., None], ...]
    families: frozenset[str]
    only_experts: bool = False
    """It says nothing about a dense model."""

    def mark(self, family: str) -> str:
        if self.only_experts and not has_experts(family):
            return NOT_APPLICABLE
        return YES if family in self.families else NO


def proofs() -> list[Proof]:
    """The columns, in the order of a model's way: it is computed, laid out, saved, served, trained."""
    return [*proofs_of_the_actor(), *proofs_of_the_weights(), *proofs_with_engines()]


def proofs_of_the_actor() -> list[Proof]:
    return [
        Proof(
            "one process",
            "Log-probabilities within 1e-5 of transformers'. Loss and gradient norm of two optimizer steps "
            "within 1e-5, and weights within 1e-6, of a float64 computation by autograd and AdamW.",
            (
                test_logits.test_log_probs_equal_transformers_after_loading,
                test_logits.test_two_steps_equal_autograd_and_adamw_in_float64,
            ),
            frozenset(FAMILIES),
        ),
        *(layout_proof(kind) for kind in KINDS),
        Proof(
            "routing replay",
            "With the experts that the rollout recorded: log-probabilities, loss and gradient norm within "
            "1e-5 of transformers with its routers forced to the same experts.",
            (
                test_routing_replay.test_log_probs_and_gradient_are_those_of_transformers_with_the_same_experts,
            ),
            frozenset(family for family, *_ in (SINGLE | TWO_RANKS).values()),
            only_experts=True,
        ),
        Proof(
            "resumed under another layout",
            "A checkpoint, with its optimizer, is loaded under another layout or number of ranks. The next "
            "step's weights are those of the float64 reference.",
            (test_checkpoint.test_a_checkpoint_resumes_under_another_layout_of_as_many_fewer_or_more_ranks,),
            frozenset(LAYOUTS[saved][0] for group in OTHER_LAYOUTS.values() for saved in group),
        ),
    ]


def proofs_of_the_weights() -> list[Proof]:
    return [
        Proof(
            "conversion",
            "Hugging Face to Megatron and back changes no bit. A sharded checkpoint converts, in one "
            "process, to the tensors that its ranks export together.",
            (
                test_round_trip.test_every_tensor_comes_back_bit_for_bit,
                test_layout_conversion.test_converting_without_the_ranks_gives_the_tensors_they_export,
            ),
            frozenset(family for family, _ in VARIANTS.values()),
        ),
        Proof(
            "export to buckets",
            "The shards of four ranks, through the weight sync's buckets, are bit for bit what "
            "Megatron-Bridge exports.",
            (test_shards.test_every_node_gets_the_tensors_of_the_bridges_export_bit_for_bit,),
            frozenset(case["family"] for case in test_shards.CASES.values()),
        ),
    ]


def proofs_with_engines() -> list[Proof]:
    return [
        Proof(
            "SGLang",
            "A real engine that was given the weights computes transformers' log-probabilities within 1e-4, "
            "or its greedy text (SmolLM2-135M, a Llama).",
            (
                test_two_engines.test_every_token_is_of_the_weights_that_it_says,
                test_nodes.test_the_log_probs_are_those_of_transformers,
                test_real_model.test_greedy_text_is_the_same_in_transformers_and_in_sglang,
            ),
            frozenset([test_two_engines.FAMILY, test_nodes.FAMILY, family_of("smollm2_135m_cpu")]),
        ),
        Proof(
            "whole loop",
            "Runs of the command line with live engines: after every sync, engine and actor compute the same "
            "log-probability for each sampled token (fp32: mean difference 1e-5, at most 1e-3). A run that "
            "was killed resumes to the same metrics.",
            (
                test_live_run.test_engine_and_actor_agree_on_every_sampled_token_after_every_sync,
                test_replay_and_resume.test_killed_in_each_phase_a_run_goes_on_to_the_metrics_of_the_uninterrupted_one,
            ),
            frozenset([family_of(command_line.RECIPE)]),
        ),
    ]


def layout_proof(kind: str) -> Proof:
    held = {family for family, layout in LAYOUTS.values() if layout.get(kind, 1) > 1}
    return Proof(
        kind.replace("_", " "),
        "A degree of 2 under that key of `layout`, alone or with others (listed below): losses and gradients "
        "within 1e-5, weights after two steps within 1e-6, of one process and of the float64 reference.",
        (
            test_layouts.test_whole_gradients_equal_the_reference_and_one_process,
            test_layouts.test_weights_after_two_steps_equal_the_reference_and_one_process,
        ),
        frozenset(held),
        only_experts=kind.startswith("expert"),
    )


def has_experts(family: str) -> bool:
    settings = FAMILIES[family][1]
    return "num_experts" in settings or "n_routed_experts" in settings


def family_of(name: str) -> str:
    """The family of a recipe's model: `qwen3_moe` in config.json is `qwen3moe` in the tests."""
    model = Path(recipe(name).model.path).name
    return json.loads(MODELS.read_text())[model]["config"]["model_type"].replace("_", "")


def words(layout: dict[str, int]) -> str:
    return ", ".join(f"{kind}={size}" for kind, size in layout.items()) or "one process"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def where(test: Callable[..., None]) -> str:
    return (
        f"`{test.__module__.replace('.', '/')}.py`: {test.__name__.removeprefix('test_').replace('_', ' ')}"
    )


def page() -> str:
    """docs/proofs.md."""
    columns = proofs()
    kinds = {columns[0].title, *(layout_proof(kind).title for kind in KINDS)}
    layouts = [
        (NAMES[family], words(layout), str(ranks_of(name))) for name, (family, layout) in LAYOUTS.items()
    ]
    resumed = [
        (NAMES[LAYOUTS[saved][0]], words(LAYOUTS[saved][1]), str(ranks_of(saved)), words(loaded), str(ranks))
        for ranks, group in OTHER_LAYOUTS.items()
        for saved, loaded in group.items()
    ]
    replayed = [
        (NAMES[family], words(layout), ", ".join(f"{k}={v}" for k, v in settings.items()) or "none")
        for family, layout, settings in (SINGLE | TWO_RANKS).values()
    ]
    converted = [
        (
            name,
            NAMES.get(family) or PROVEN[family],
            words_of_changes(changes),
            "bytes and logits" if name in VERIFIED else "bytes",
        )
        for name, (family, changes) in VARIANTS.items()
    ]
    parts = [
        HEAD,
        "## Families and proofs\n",
        "Parallelism, by the key under `layout`:\n",
        matrix([column for column in columns if column.title in kinds]),
        "The rest of a model's way, from a checkpoint to a whole run:\n",
        matrix([column for column in columns if column.title not in kinds]),
        LEGEND,
        "## What each column compares\n",
        table(
            ["column", "what is compared", "test"],
            [
                [", ".join(c.title for c in same), same[0].what, "<br>".join(map(where, same[0].tests))]
                for same in map(list, grouped(columns))
            ],
        ),
        "## Layouts\n\nEach is compared with one process and with the float64 reference.\n",
        table(["family", "layout", "ranks"], sorted(layouts)),
        "## Checkpoints under another layout\n",
        table(["family", "saved under", "ranks", "resumed under", "ranks"], sorted(resumed)),
        "## Routing replay\n",
        table(["family", "layout", "the actor's settings"], sorted(replayed)),
        "## Conversions\n",
        table(["case", "family", "what differs", "compared"], converted),
        RECIPE_HEAD,
        table(["recipe", "model", "layout", "GPUs"], map(row_of_recipe, sorted(test_planning.ON_GPUS))),
    ]
    return "\n".join(parts)


def matrix(columns: list[Proof]) -> str:
    """A row a family."""
    return table(
        ["family", *(column.title for column in columns)],
        [[NAMES[family], *(column.mark(family) for column in columns)] for family in FAMILIES],
    )


def grouped(columns: list[Proof]) -> Iterable[Iterable[Proof]]:
    """Neighbouring columns that compare the same."""
    return (group for _, group in itertools.groupby(columns, key=lambda column: column.what))


def row_of_recipe(name: str) -> list[str]:
    config = recipe(name)
    layout = {kind: size for kind in KINDS if (size := getattr(config.layout, kind)) and size > 1}
    return [f"`{name}`", Path(config.model.path).name, words(layout), str(config.devices)]


def words_of_changes(changes: dict[str, object]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in changes.items()) or "nothing"


def short_table() -> str:
    """README's: one row for what differs in its mathematics, the columns that a reader asks for first."""
    rows = {
        "Llama 3": ["llama", "llama3"],
        "Qwen2, Qwen2.5": ["qwen2"],
        "Qwen3": ["qwen3"],
        "Qwen3-MoE": ["qwen3moe"],
        "Moonlight, DeepSeek-V3, Kimi-K2": ["moonlight", "deepseek"],
    }
    assert sorted(family for families in rows.values() for family in families) == sorted(FAMILIES)
    left_out = {"expert tensor", "resumed under another layout", "conversion", "export to buckets"}
    columns = [column for column in proofs() if column.title not in left_out]
    return table(
        ["", *(column.title for column in columns)],
        [
            [
                name,
                *(max((c.mark(f) for f in families), key=[NOT_APPLICABLE, NO, YES].index) for c in columns),
            ]
            for name, families in rows.items()
        ],
    )


def with_short_table(readme: str) -> str:
    """README's text with the table between its two markers."""
    before, _, rest = readme.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{short_table()}{MARKS[1]}{after}"


HEAD = """\
# What is proved, and where

Written by `make docs` from the parameter lists of the tests; edit those.

Read a row like this: Qwen3 under `layout.tensor=2`, on CPU processes, takes the same optimizer steps as
transformers in float64. Every mark is a test that `make test` runs. The models have the real architecture
and about a hundred thousand random weights, on one to four CPU processes.

**No mark is a run on a GPU.** What ran on one is in [On a GPU](gpu.md#results).
"""
LEGEND = """\
✓ a test runs it. – no test runs it. Empty: the model has no experts.

SGLang has latent attention for GPUs only, so the last two columns of those families wait for a GPU. On a
CPU such a model trains from replayed rollouts. `make demo` runs the whole loop on SmolLM2-135M, a Llama; no
test does.
"""
RECIPE_HEAD = f"""\
## Recipes for GPUs

None of these has been run. Two things are tested on each. The planner finds that it fits its nodes of 8 H100
({where(test_planning.test_every_recipe_fits_the_cluster_it_is_named_after)}). Its batch script is the one
that was reviewed ({where(test_script.test_the_scripts_are_those_that_were_reviewed)}).
"""


if __name__ == "__main__":
    TARGET.write_text(page())
    README.write_text(with_short_table(README.read_text()))
    print(f"{TARGET}\n{README}")
