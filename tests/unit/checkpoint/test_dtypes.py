import numpy as np
import pytest
import torch

from regrow.checkpoint.dtypes import from_float32, to_float32

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_widens_as_in_torch(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    raw = bits if dtype == "BF16" else bits.view(np.float16)
    expected = torch.from_numpy(bits.view(np.int16)).view(_TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(to_float32(raw, dtype), expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_narrowing_rounds_as_torch_does(dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    ties = (np.arange(0x3F800000, 0x3F900000, 0x8000, dtype=np.uint32)).view(np.float32)
    values = np.concatenate([values[~np.isnan(values)], ties, np.float32([0, -0.0, np.inf, 3.4e38, 1e-45])])
    found = to_float32(from_float32(values, dtype), dtype)
    expected = torch.from_numpy(values.copy()).to(_TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_nan_stays_nan():
    values = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(to_float32(from_float32(values, "BF16"), "BF16")).all()


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "BOOL"])
def test_integers_and_float8_are_no_weights(dtype):
    with pytest.raises(TypeError):
        to_float32(np.zeros(3, np.uint8), dtype)
    with pytest.raises(TypeError):
        from_float32(np.zeros(3, np.float32), dtype)
