"""These tests run on the device: `python -m tests.emulated_cuda.run -m pytest tests/emulated_cuda`."""

from __future__ import annotations

import os

import pytest

if "EMULATED_CUDA_STATE" not in os.environ:
    raise pytest.UsageError("tests/emulated_cuda runs on the emulated device: make gpu-emulated")
