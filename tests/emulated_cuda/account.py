"""What this process holds of a device, by the device's own account (device/memory.h); bytes."""

from __future__ import annotations

import ctypes


def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL("libcudart.so.13")
    library.emulated_peak_bytes.restype = library.emulated_held_bytes.restype = ctypes.c_size_t
    return library


def held_bytes(device: int) -> int:
    """Now: tensors, and what torch's allocator keeps beside them."""
    return int(_runtime().emulated_held_bytes(device))


def peak_bytes(device: int) -> int:
    """The most since reset_peak, or since the process began."""
    return int(_runtime().emulated_peak_bytes(device))


def reset_peak(device: int) -> None:
    """Begin that count anew, with what is held now."""
    _runtime().emulated_reset_peak(device)
