"""These tests run on the device: `python -m tests.emulated_cuda.run -m pytest tests/emulated_cuda`."""

from __future__ import annotations

import os

import pytest

from tests.emulated_cuda.run import device_of_this_worker

if "EMULATED_CUDA_STATE" not in os.environ:
    raise pytest.UsageError(
        "start them with `python -m tests.emulated_cuda.run -m pytest tests/emulated_cuda`"
    )
device_of_this_worker()
