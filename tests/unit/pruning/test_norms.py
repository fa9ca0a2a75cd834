import numpy as np
import pytest
import torch

from regrow.checkpoint import CheckpointReader
from regrow.families import mlp_sites
from regrow.pruning import norms
from regrow.pruning.norms import channel_norms
from tiny_models import save_tiny_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen3_5_moe"])
@pytest.mark.parametrize("ord", [1, 2])
@pytest.mark.parametrize("block", [1 << 19, 1000, 1])
def test_norms_equal_those_of_the_whole_matrices(tmp_path, monkeypatch, family, ord, dtype, block):
    monkeypatch.setattr(norms, "_BLOCK_BYTES", block)
    reader = CheckpointReader(save_tiny_model(family, tmp_path / "m", dtype=dtype))
    for site in mlp_sites(reader.config, reader.tensors):
        found = channel_norms(reader, site, ord)

        def matrix(ref):
            return reader.read_float32(ref.name, expert=ref.expert).astype(np.float64)

        gate = matrix(site.gate)[site.gate.start :][: site.width]
        up = matrix(site.up)[site.up.start :][: site.width]
        np.testing.assert_allclose(found.gate, np.linalg.norm(gate, ord, axis=1), rtol=1e-6)
        np.testing.assert_allclose(found.up, np.linalg.norm(up, ord, axis=1), rtol=1e-6)
        np.testing.assert_allclose(found.down, np.linalg.norm(matrix(site.down), ord, axis=0), rtol=1e-6)
