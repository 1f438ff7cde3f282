"""Names in the configuration that stand for code: the package's, a module's, a file's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_pmd.errors import ConfigError
from megatron_pmd.plugins import Registry, load


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with nothing of it imported yet; sys.path is as before afterwards."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_stands_for_what_python_itself_imports(folder: Path) -> None:
    from collections import OrderedDict

    assert load("collections:OrderedDict", what="x") is OrderedDict
    registry = Registry("dictionary", {"ordered": "collections:OrderedDict"})
    assert registry.load("ordered", what="x") is OrderedDict
    assert registry.load("collections:OrderedDict", what="x") is OrderedDict


def test_a_module_of_the_current_folder_is_found(folder: Path) -> None:
    (folder / "module_of_this_folder.py").write_text("def answer(): return 42\n")
    assert load("module_of_this_folder:answer", what="x")() == 42


def test_a_file_is_run_once_and_may_import_its_neighbours(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "neighbour_of_own.py").write_text("NUMBER = 42\n")
    (inner / "own.py").write_text("import neighbour_of_own\ndef answer(): return neighbour_of_own.NUMBER\n")
    found = load("inner/own.py:answer", what="x")
    assert found() == 42
    assert load(f"{inner}/../inner/own.py:answer", what="x") is found


def test_files_of_one_name_and_a_file_with_the_name_of_a_module_are_kept_apart(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "json.py").write_text(f"def answer(): return {name!r}\n")
    assert [load(f"{name}/json.py:answer", what="x")() for name in ("one", "two")] == ["one", "two"]
    assert load("json:dumps", what="x")([1]) == "[1]"


def test_what_a_file_defines_can_be_pickled(folder: Path) -> None:
    import pickle

    (folder / "my.own.py").write_text("class Thing: pass\n")
    thing = load("my.own.py:Thing", what="x")
    assert type(pickle.loads(pickle.dumps(thing()))) is thing


def test_a_module_beside_the_console_script_does_not_hide_the_package(folder: Path) -> None:
    """`megatron-pmd` has its own folder first on the path, not the current one."""
    (folder / "typing.py").write_text("raise RuntimeError('the standard library is hidden')\n")
    (folder / "only_here.py").write_text("import typing\ndef answer(): return typing.Any\n")
    code = (
        "import sys; sys.path.remove(''); from megatron_pmd.plugins import load; "
        "load('only_here:answer', what='x')"
    )
    project = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], cwd=folder, env={"PYTHONPATH": project}, check=True)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("absent_module:f", "x='absent_module:f': absent_module cannot be imported: ModuleNotFoundError"),
        ("absent.py:f", "absent.py: no such file"),
        ("broken.py:f", "broken.py cannot be imported: RuntimeError: no licence"),
        ("opens.py:f", "opens.py cannot be imported: FileNotFoundError"),
        ("math:squirt", "has no squirt (did you mean sqrt?)"),
        ("math:pi", "pi is a float, not a function or class"),
        ("math", "x='math' is not of the form module:name"),
        (":f", "x=':f' is not of the form module:name"),
        ("math:", "x='math:' is not of the form module:name"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_its_setting(folder: Path, reference: str, message: str) -> None:
    (folder / "broken.py").write_text("raise RuntimeError('no licence')\n")
    (folder / "opens.py").write_text("open('absent')\n")
    for _ in range(2):  # a module that failed to run is not there the second time either
        with pytest.raises(ConfigError) as caught:
            load(reference, what="x")
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["ordred", "ordred:", ":ordred"])
def test_an_unknown_name_is_answered_with_the_nearest_and_all_there_are(name: str) -> None:
    registry = Registry(
        "dictionary", {"ordered": "collections:OrderedDict", "counter": "collections:Counter"}
    )
    with pytest.raises(ConfigError) as caught:
        registry.load(name, what="setting")
    assert f"setting={name!r} is no dictionary (did you mean ordered?); use counter, ordered, or" in str(
        caught.value
    )
