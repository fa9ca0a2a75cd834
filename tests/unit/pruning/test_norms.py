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
@pytest.mark.parametrize("block", [1 << 19, 1000, 1])
def test_norms_equal_those_of_the_whole_matrices(tmp_path, monkeypatch, family, dtype, block):
    monkeypatch.setattr(norms, "_BLOCK_BYTES", block)
    reader = CheckpointReader(save_tiny_model(family, tmp_path / "m", dtype=dtype))
    for site in mlp_sites(reader.config, reader.tensors):
        found = channel_norms(reader, site)
        down = reader.read_float32(site.down.name, expert=site.down.expert).astype(np.float64)
        np.testing.assert_allclose(found.l1, np.linalg.norm(down, 1, axis=0), rtol=1e-6)
        np.testing.assert_allclose(found.l2, np.linalg.norm(down, 2, axis=0), rtol=1e-6)
