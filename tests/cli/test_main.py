"""What a command says, and its exit code, where it cannot do what it was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_pmd.cli.main import main


def test_a_full_disk_is_one_line_that_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(SystemExit) as ended:
        main(write)
    assert ended.value.code == 1
    assert "No space left on device: make room and try again" in capsys.readouterr().err


def test_another_error_of_the_system_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(lambda: (tmp_path / "absent").read_text())
