"""Generation on a GPU writes what it writes on a CPU."""

import pytest
import torch

from regrow.modeling.generate import generate_responses
from tiny_models import save_tiny_tokenizer, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "qwen3_5_text"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_text_as_on_a_cpu(tmp_path, family, temperature):
    tokenizer = save_tiny_tokenizer(tmp_path)
    model = tiny_model(family)
    prompts = ["a", "abc abc abc abc", "def " * 9, "ab", "a b c d e f"]
    options = {"max_new_tokens": 24, "batch_size": 3, "temperature": temperature, "progress": None}
    texts = [
        [
            response.token_ids
            for response in generate_responses(model.to(device), tokenizer, prompts, **options)
        ]
        for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]
