from pathlib import Path

from megatron_pmd.doctor import pins
from tools.write_package_table import PAGE, Installed, installed, page


def package(folder: Path, name: str, size_bytes: int, *requires: str) -> None:
    """A package with one file, as pip leaves it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (folder / f"{name}.py").write_bytes(b"#" * size_bytes)
    wanted = "".join(f"Requires-Dist: {line}\n" for line in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{wanted}")
    (info / "RECORD").write_text(f"{name}.py,,\n{name}-1.0.dist-info/METADATA,,\n")


def test_a_package_has_the_size_of_its_files_and_the_names_of_those_that_ask_for_it(tmp_path: Path):
    package(tmp_path, "engine", 3000, "Kernels[fast]>=1", "absent; python_version < '3'")
    package(tmp_path, "kernels", 5000, "speed; extra == 'fast'", "slowness; extra == 'slow'")
    for name in ("speed", "slowness"):
        package(tmp_path, name, 10)
    found = {package.name: package for package in installed(tmp_path)}
    metadata = tmp_path / "engine-1.0.dist-info/METADATA"
    assert found["engine"] == Installed("engine", "1.0", 3000 + metadata.stat().st_size, [])
    asked = {name: package.asked_for_by for name, package in found.items()}
    assert asked == {"engine": [], "kernels": ["engine"], "speed": ["kernels"], "slowness": []}
    assert list(found)[:2] == ["kernels", "engine"]
    assert "| kernels | 1.0 | 0.0051 | engine |" in page(list(found.values()))


def test_the_committed_page_has_the_pinned_versions():
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    pinned = pins("stack")
    stale = [row for row in rows if pinned[row[0].removeprefix("| ")] != row[1]]
    assert len(rows) > 200 and stale == [], "write docs/packages.md again: make gpu-packages"
