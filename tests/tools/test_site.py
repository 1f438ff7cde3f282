"""What carries the pages from the code host to the site, and what looks at the result."""

import re
from pathlib import Path

import pytest

from tools.check_site import problems
from tools.stage_docs import ROOT, ROOT_PAGES, BrokenLink, for_site, stage


def test_a_link_works_on_the_code_host_and_in_the_site():
    assert "[s](slurm.md#pre-flight)" in for_site("[s](docs/slurm.md#pre-flight)", "README.md")
    assert "[r](index.md#try-it)" in for_site("[r](../README.md#try-it)", "docs/slurm.md")
    assert "[r](../index.md)" in for_site("[r](../../README.md)", "docs/tutorials/first.md")
    assert "[a](architecture.md)" in for_site("[a](ARCHITECTURE.md)", "README.md")
    assert '<img src="images/x.svg"' in for_site('<img src="docs/images/x.svg">', "README.md")


def test_a_link_to_a_file_that_the_site_does_not_hold_is_refused():
    with pytest.raises(BrokenLink, match=re.escape("docs/slurm.md links to ../slurm/train.sbatch")):
        for_site("[script](../slurm/train.sbatch)", "docs/slurm.md")


def test_links_in_code_and_to_other_hosts_stay_as_they_are():
    text = "```\n[x](docs/slurm.md)\n```\n[y](https://example.org/docs/a.md)\n"
    assert for_site(text, "README.md") == text


def test_a_list_that_follows_a_paragraph_gets_the_blank_line_that_the_generator_needs():
    assert for_site("Two things:\n- one\n  more\n- two\n", "docs/a.md") == (
        "Two things:\n\n- one\n  more\n- two\n"
    )


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "zensical.toml").read_text()
    pages = [file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")]
    assert [page for page in [*pages, *ROOT_PAGES.values()] if f'"{page}"' not in navigation] == []


def test_the_pages_of_this_repository_can_be_staged(tmp_path: Path):
    stage(ROOT, tmp_path / "pages")
    assert (tmp_path / "pages/index.md").read_text().startswith("# megatron-pmd")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="gone.html">x</a>', "gone.html: no such file"),
        ('<a href="other.html#gone">x</a>', "other.html#gone: no such anchor"),
        ('<a href="#gone">x</a>', "#gone: no such anchor"),
        ('<img src="images/gone.png">', "images/gone.png: no such file"),
        ('<script src="https://cdn.example.org/x.js"></script>', "loads https://cdn.example.org/x.js"),
        ('<link rel="stylesheet" href="https://fonts.example.org/x.css">', "loads https://fonts.example.org/x.css"),
    ],
)  # fmt: skip
def test_a_dead_link_anchor_or_image_and_a_file_of_another_host_are_found(tmp_path: Path, body, problem):
    (tmp_path / "index.html").write_text(f"<html>{body}</html>")
    (tmp_path / "other.html").write_text('<h2 id="there">There</h2>')
    assert len(found := problems(tmp_path)) == 1 and problem in found[0]


def test_a_site_whose_links_lead_somewhere_has_no_problems(tmp_path: Path):
    (tmp_path / "index.html").write_text(
        '<a href="other.html#there">x</a> <a href="https://example.org">y</a> <a href="mailto:a@b.c">z</a>'
    )
    (tmp_path / "other.html").write_text('<h2 id="there">There</h2><a href="index.html">back</a>')
    assert problems(tmp_path) == []
