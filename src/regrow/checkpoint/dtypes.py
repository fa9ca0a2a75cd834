"""Safetensors' dtypes: sizes, and exact conversion to and from float32.

numpy has no bfloat16, so BF16 is held as raw uint16; widening is exact and narrowing rounds to nearest, ties
to even, as torch does.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# dtype -> bytes per element, for every whole-byte dtype of the safetensors format
ITEM_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")

_RAW: dict[str, Any] = {
    "BOOL": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": np.uint16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "I64": np.int64,
    "U64": np.uint64,
    "F64": np.float64,
    "C64": np.complex64,
    "U16": np.uint16,
}


def raw_dtype(dtype: str) -> np.dtype[Any]:
    """The little-endian numpy dtype that holds a safetensors dtype bit for bit."""
    return np.dtype(_RAW.get(dtype, np.uint8)).newbyteorder("<")


def to_float32(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Widen raw values to float32; exact for BF16, F16 and F32, rounded for F64."""
    if dtype == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{dtype} holds no floating-point weights")
    return raw.astype(np.float32)


def from_float32(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Narrow float32 values to the raw form of `dtype`, rounding to nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{dtype} holds no floating-point weights")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=raw_dtype(dtype))
