"""Dequantising GGUF blocks in torch, against the `gguf` package, on bytes of every kind."""

import gguf
import numpy as np
import pytest
import torch

from trainer.models.gguf_blocks import LAYOUTS, dequantise

HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
"""Where a block's float16 numbers are."""


def random_rows(kind: str, rows: int, blocks: int) -> np.ndarray:
    """Any bytes are a block, but for float16 numbers that are not finite."""
    generator = np.random.default_rng(7)
    size = LAYOUTS[kind].num_bytes
    data = generator.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for start in HALVES[kind]:
        scales = generator.normal(0, 0.1, (rows, blocks, 1)).astype(np.float16)
        data[..., start : start + 2] = scales.view(np.uint8)
    return data.reshape(rows, blocks * size)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_values_are_those_of_the_gguf_package(kind: str) -> None:
    data = random_rows(kind, rows=5, blocks=3)
    wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    found = dequantise(torch.from_numpy(data), kind)
    assert found.shape == (5, 3 * LAYOUTS[kind].weights)
    # the same float32 operations; a product with a sum behind it may be rounded once or twice
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_sizes_are_those_of_the_gguf_package(kind: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == LAYOUTS[kind][:2]
