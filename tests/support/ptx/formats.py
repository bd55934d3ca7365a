"""Types of PTX as NumPy dtypes, and the number formats that NumPy lacks."""

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {
    **{f"u{8 * size}": dtype for size, dtype in UNSIGNED.items()},
    **{f"b{8 * size}": dtype for size, dtype in UNSIGNED.items()},
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "s16x2": np.uint32,
    "u16x2": np.uint32,
    "f32x2": np.uint64,
    "tf32": np.uint32,
    "pred": np.bool_,
}
SIZE = {name: np.dtype(dtype).itemsize for name, dtype in TYPES.items()}


def is_float(name: str) -> bool:
    """Whether a PTX type holds floating-point numbers."""
    return name[0] == "f" or name.startswith("bf") or name == "tf32"


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    """uint16 -> float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: np.ndarray, *, toward_zero: bool = False) -> np.ndarray:
    """float32 -> uint16, rounded to nearest even unless `toward_zero`; NaN becomes the canonical one of the hardware."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if not toward_zero:
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def float_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 -> uint32 with 10 bits of mantissa, rounded to nearest, ties away from zero."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def halves(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint32 -> its low and high uint16."""
    return (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def join(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two uint16 -> uint32."""
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def half_to_float(bits: np.ndarray, name: str) -> np.ndarray:
    """uint16 bits of f16 or bf16 (a type name that starts so) -> float32."""
    return bf16_to_float(bits) if name.startswith("bf16") else bits.view(np.float16).astype(np.float32)


def float_to_half(values: np.ndarray, name: str, *, toward_zero: bool = False) -> np.ndarray:
    """float32 -> uint16 bits of f16 or bf16 (a type name that starts so)."""
    if name.startswith("bf16"):
        return float_to_bf16(values, toward_zero=toward_zero)
    return values.astype(np.float16).view(np.uint16)
