import pytest

from tests.actor.conftest import LAYOUTS
from tests.actor.tiny_models import FAMILIES
from tools.write_proof_table import (
    NAMES,
    NO,
    NOT_APPLICABLE,
    README,
    TARGET,
    YES,
    page,
    proofs,
    short_table,
    with_short_table,
)


def test_the_committed_page_is_what_the_tests_run():
    assert TARGET.read_text() == page(), "stale: run `make docs`"


def test_readmes_table_is_what_the_tests_run():
    assert README.read_text() == with_short_table(README.read_text()), "stale: run `make docs`"
    assert short_table() in README.read_text()


def test_a_layout_that_loses_its_test_loses_its_mark(monkeypatch: pytest.MonkeyPatch):
    marks = {proof.title: proof.mark("deepseek") for proof in proofs()}
    assert marks["context"] == YES and marks["data"] == NO
    monkeypatch.delitem(LAYOUTS, "latent, context=2, expert=2")
    assert {proof.title: proof.mark("deepseek") for proof in proofs()}["context"] == NO


def test_a_dense_model_has_no_mark_for_what_only_experts_have():
    marks = {proof.title: proof.mark("llama") for proof in proofs()}
    assert marks["expert"] == marks["routing replay"] == NOT_APPLICABLE


def test_every_family_of_the_logits_test_has_a_row():
    assert [f"\n| {NAMES[family]} | {YES} |" in page() for family in FAMILIES] == [True] * len(FAMILIES)
