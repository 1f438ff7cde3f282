from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.command_line import CommandLine


@pytest.fixture(scope="session")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    return CommandLine(tmp_path_factory.mktemp("end_to_end"))


@pytest.fixture(scope="session")
def live(command_line: CommandLine) -> Path:
    """The folder of a complete run of three iterations with a live engine."""
    command_line.run("live")
    return command_line.path("live")
