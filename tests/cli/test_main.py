"""What a command says, and its exit code, where it cannot do what it was asked for."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_pmd.cli.main import app, main
from megatron_pmd.observe.journal import Journal
from tests.observe.synthetic_run import make_config


def test_a_full_disk_is_one_line_that_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(SystemExit) as ended:
        main(write)
    assert ended.value.code == 1
    assert "No space left on device: make room and try again" in capsys.readouterr().err


def test_a_file_that_the_system_refuses_is_one_line_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in the place of a folder: tests run as root, who may write into every folder."""
    Journal.open(tmp_path / "run", make_config(), 0).close()
    (tmp_path / "taken").write_text("x")
    words = ["report", str(tmp_path / "run"), "--out", str(tmp_path / "taken" / "page.html")]
    with pytest.raises(SystemExit) as ended:
        main(lambda: app(words, standalone_mode=False))
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1
    assert said.startswith(f"failed: {tmp_path}/taken/page.html") and said.endswith(": Not a directory\n")
    app([*words[:3], str(tmp_path / "page.html")], standalone_mode=False)
    assert "</html>" in (tmp_path / "page.html").read_text() and not list(tmp_path.glob("run/*.html"))


def test_an_error_of_the_system_that_names_no_file_keeps_its_traceback() -> None:
    with pytest.raises(ConnectionRefusedError):
        main(lambda: socket.create_connection(("127.0.0.1", 9)))
