"""Write docs/packages.md: every package of this environment, with its version and what it takes on disk.

`make gpu-packages` runs it in the environment of `make gpu-contract`.
"""

from __future__ import annotations

import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from megatron_pmd.doctor import normalised

PAGE = Path(__file__).resolve().parent.parent / "docs" / "packages.md"
NOT_LISTED = {"megatron-pmd", "pip"}
NAMED = 3
"""How many of the packages that ask for one are named."""

HEAD = """\
# All packages

Every package of the environment of `make gpu-contract`, in the version that `constraints/stack.txt` pins.
Written by `make gpu-packages`. What the important ones are for stands in [dependencies.md](dependencies.md).

MB are 10⁶ bytes of the files that the package installed, with its compiled Python. "Asked for by" are
installed packages that require it. Where the column is empty, this project or its tools ask for it.

"""


@dataclass(frozen=True)
class Installed:
    """One package of an environment."""

    name: str
    version: str
    size_bytes: int
    asked_for_by: list[str]


def installed(site_packages: Path) -> list[Installed]:
    """The packages in a folder, largest first; extras that some package asks for count as asked for."""
    found = {
        normalised(distribution.metadata["Name"]): distribution
        for distribution in metadata.distributions(path=[str(site_packages)])
    }
    wants = {
        name: [Requirement(text) for text in distribution.requires or ()]
        for name, distribution in found.items()
        if name not in NOT_LISTED
    }
    extras: dict[str, set[str]] = defaultdict(lambda: {""})
    for wanted in (wanted for requirements in wants.values() for wanted in requirements):
        extras[normalised(wanted.name)] |= wanted.extras
    asking: dict[str, list[str]] = defaultdict(list)
    for name in sorted(wants):
        for wanted in wants[name]:
            marker, target = wanted.marker, normalised(wanted.name)
            asked = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras[name])
            if asked and target != name and name not in asking[target]:
                asking[target].append(name)
    packages = [
        Installed(name, distribution.version, _size_bytes(distribution), asking[name])
        for name, distribution in found.items()
        if name not in NOT_LISTED
    ]
    return sorted(packages, key=lambda package: (-package.size_bytes, package.name))


def _size_bytes(distribution: metadata.Distribution) -> int:
    paths = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())


def page(packages: list[Installed]) -> str:
    """docs/packages.md."""
    total = sum(package.size_bytes for package in packages)
    lines = [
        f"{len(packages)} packages, {total / 1e9:.1f} GB.", "",
        "| package | version | MB | asked for by |", "|---|---|--:|---|",
    ]  # fmt: skip
    for package in packages:
        named = ", ".join(package.asked_for_by[:NAMED])
        more = len(package.asked_for_by) - NAMED
        asked = f"{named} and {more} more" if more > 0 else named
        lines.append(f"| {package.name} | {package.version} | {_megabytes(package.size_bytes)} | {asked} |")
    return HEAD + "\n".join(lines) + "\n"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f}" if size_bytes >= 10e6 else f"{size_bytes / 1e6:.2g}"


if __name__ == "__main__":
    PAGE.write_text(page(installed(Path(sysconfig.get_path("purelib")))))
