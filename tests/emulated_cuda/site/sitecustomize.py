"""Python runs this first in every process of the emulated device: run.py puts it on the path."""

import importlib
import os

importlib.import_module(os.environ["EMULATED_CUDA_HOOKS"]).install()
