"""The device and precision that an encoder runs with."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, Literal

from aligncurate.errors import UserError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16"]

_SCORING = ("torch", "torchvision", "open_clip_torch", "pillow", "simplejpeg", "numpy")


def find_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:i`. Raises UserError if this machine does not have it."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: use auto, cpu, cuda or cuda:0.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: use auto, cpu, cuda or cuda:0.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has no such GPU ({torch.cuda.device_count()} found).")
    return device


def choose_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `auto` means on a device: bf16 on a GPU that computes in it natively (Ampere and newer), else fp32."""
    import torch

    if precision != "auto":
        return precision
    native = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return "bf16" if native else "fp32"


def has_bf16_units() -> bool:
    """Whether this processor computes in bf16 itself (AMX, AVX512-BF16), which is faster than fp32 there."""
    import torch

    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def scoring_environment(device: torch.device) -> dict[str, Any]:
    """What scores depend on besides the encoder and the options, as the manifest records it in `computed_with`.

    Kernels round differently on another kind of GPU or CPU, so only equal environments give equal scores.
    """
    from aligncurate.dataset.manifest import library_versions  # loads Arrow, which the options do not need

    return {"device": kind_of(device), "versions": library_versions(_SCORING)}


def kind_of(device: torch.device) -> dict[str, Any]:
    import torch

    if device.type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return {"kind": device.type, "machine": platform.machine(), "instructions": capability}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "kind": device.type,
        "name": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }
