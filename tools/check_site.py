"""Check a built site: links, anchors and images lead somewhere, and nothing is loaded from another host.

    python tools/check_site.py site

The generator's strict mode checks links between pages. This reads what it wrote, with images and styles.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"img": "src", "script": "src", "source": "src", "iframe": "src"}
"""What a browser fetches by itself: tag -> attribute. A <link> counts unless it only names another page."""
ONLY_NAMED = {"canonical", "next", "prev", "alternate", "edit"}


class Page(HTMLParser):
    """The links, loaded files and anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and not ONLY_NAMED & set(found.get("rel", "").split()):
            self.loaded.append(found.get("href", ""))
        elif tag in LOADED and found.get(LOADED[tag]):
            self.loaded.append(found[LOADED[tag]])


def problems(site: Path) -> list[str]:
    """One line for each dead link, dead anchor, missing file and file of another host."""
    pages = {file.resolve(): Page(file.read_text()) for file in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        name = file.relative_to(site.resolve())
        found += [f"{name} loads {url} from another host" for url in page.loaded if is_remote(url)]
        for address in page.links + page.loaded:
            if not is_remote(address) and (problem := dead(address, file, site.resolve(), pages)):
                found.append(f"{name}: {address}: {problem}")
    return found


def is_remote(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https")


def dead(address: str, page: Path, site: Path, pages: dict[Path, Page]) -> str | None:
    """Why the address leads nowhere, or None. `page` is where it stands; "/" is the site's own root."""
    parts = urlsplit(address)
    if parts.scheme:  # mailto:, data:
        return None
    path = unquote(parts.path)
    start = site if path.startswith("/") else page.parent
    target = (start / path.lstrip("/")).resolve() if path else page
    if target.is_dir():
        target = target / "index.html"
    if not target.is_file():
        return "no such file"
    anchor = unquote(parts.fragment)
    # "#__something" is for the theme's own scripts
    if not anchor or anchor.startswith("__") or target not in pages or anchor in pages[target].anchors:
        return None
    return "no such anchor"


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or "check_site: every link leads somewhere; nothing is loaded from another host")
    sys.exit(bool(found))
