"""Copy the pages into a folder that the site is built from: docs/, and the pages at the repository's root.

A link between two pages is written for the code host: README.md says docs/slurm.md, docs/slurm.md says
../README.md. In the site these pages stand in one folder, so links are rewritten. A link to a file that is
no page of the site is refused: it would work in one of the two places only.

    python tools/stage_docs.py build/docs
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Page at the root -> its name in the site."""
LINK = re.compile(r"""(\]\(|<(?:img|a)\b[^>]*?\b(?:src|href)=")([^)\s"#]+)(?=[)\s"#])""")
FENCE = re.compile(r"\s*(```|~~~)")
LIST_ITEM = re.compile(r"\s*([-*+]|\d+\.)\s")


class BrokenLink(Exception):
    """A link that cannot work in the site; says in which page, and what to do."""


def stage(root: Path, target: Path) -> None:
    """Write the site's sources of the repository `root` to the folder `target`, which is emptied first.

    Raises BrokenLink for a relative link to a file that is not in the site.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root / "docs", target)
    for page, name in ROOT_PAGES.items():
        (target / name).write_text(for_site((root / page).read_text(), page))
    for file in sorted(target.rglob("*.md")):
        page = f"docs/{file.relative_to(target).as_posix()}"
        if page.removeprefix("docs/") not in ROOT_PAGES.values():
            file.write_text(for_site(file.read_text(), page))


def for_site(text: str, page: str) -> str:
    """The page's text with its links rewritten and the blank lines that Python-Markdown needs."""
    lines: list[str] = []
    for line, is_code in with_code_marked(text.splitlines()):
        if not is_code:
            if lines and starts_a_block(line, lines[-1]):
                lines.append("")
            line = LINK.sub(lambda found: found[1] + rewritten(found[2], page), line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def with_code_marked(lines: list[str]) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it belongs to a fenced block."""
    fence = None
    for line in lines:
        found = FENCE.match(line)
        yield line, bool(fence or found)
        if found:
            fence = found[1] if fence is None else (None if fence == found[1] else fence)


def starts_a_block(line: str, before: str) -> bool:
    """Whether a list or a table begins here without the blank line that Python-Markdown asks for."""
    if not before.strip() or before.startswith("#"):
        return False
    if LIST_ITEM.match(line):
        # an indented line before goes on with an item of the same list
        return not LIST_ITEM.match(before) and not before.startswith(" ") and not line.startswith(" ")
    return line.startswith("|") and not before.startswith("|")


def rewritten(link: str, page: str) -> str:
    """A link in `page`, as the page's copy in the site needs it."""
    if re.match(r"[a-z]+:", link):
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if target not in ROOT_PAGES and not target.startswith("docs/"):
        raise BrokenLink(f"{page} links to {link}, which the site does not hold: write it as code, no link")
    return posixpath.relpath(in_site(target), posixpath.dirname(in_site(page)) or ".")


def in_site(path: str) -> str:
    """A file of the repository, by its path in the site."""
    return ROOT_PAGES.get(path) or path.removeprefix("docs/")


if __name__ == "__main__":
    try:
        stage(ROOT, Path(sys.argv[1]))
    except BrokenLink as error:
        sys.exit(f"stage_docs: {error}")
