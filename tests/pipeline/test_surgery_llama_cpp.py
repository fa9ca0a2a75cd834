"""Pruned checkpoints in a real second engine: llama.cpp converts them and gives transformers' probabilities.

Needs llama.cpp's `convert_hf_to_gguf.py` with its folder (in the source archive of llama-cpp-python) named by
REGROW_LLAMA_CPP, and the packages xllamacpp (prebuilt runtime) and sentencepiece.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regrow.checkpoint import CheckpointReader
from regrow.pruning.rewrite import rewrite_checkpoint
from regrow.pruning.verify import verify_checkpoint
from surgery_helpers import load, random_plan
from tiny_models import save_tiny_model

pytestmark = pytest.mark.slow

# The converter knows tokenizers by a hash of their output; the tests' byte tokenizer is not among them.
CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
sys.argv[:] = ["convert_hf_to_gguf.py", *sys.argv[2:]]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


@pytest.fixture
def llama_cpp() -> Path:
    if "REGROW_LLAMA_CPP" not in os.environ:
        pytest.skip("needs REGROW_LLAMA_CPP, the folder of llama.cpp's convert_hf_to_gguf.py")
    pytest.importorskip("xllamacpp", reason="needs llama.cpp's runtime, package xllamacpp")
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter needs sentencepiece")
    return Path(os.environ["REGROW_LLAMA_CPP"])


@pytest.mark.parametrize(
    ("family", "mtp", "options"),
    [
        ("llama", "prune", []),
        ("qwen3", "prune", []),
        ("qwen3_5", "prune", []),
        ("qwen3_5", "drop", ["--no-mtp"]),
    ],
)
def test_llama_cpp_gives_the_probabilities_of_transformers(llama_cpp, tmp_path, family, mtp, options):
    import xllamacpp

    parent = CheckpointReader(save_tiny_model(family, tmp_path / "parent", seed=1))
    out = tmp_path / "out"
    plan = random_plan(parent, seed=3, widths={"dense": 64})
    rewrite_checkpoint(parent=parent, plan=plan, out=out, shards=2, mtp=mtp)
    assert verify_checkpoint(out)["engines"]["llama_cpp"]["ok"] is True
    result = _convert(llama_cpp, out, tmp_path / "model.gguf", options)
    assert result.returncode == 0, result.stderr[-2000:]

    settings = xllamacpp.CommonParams()
    settings.model.path = str(tmp_path / "model.gguf")
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    for threads in (settings.cpuparams, settings.cpuparams_batch):
        threads.n_threads, threads.poll = 1, 0
    server = xllamacpp.Server(settings)
    tokens = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46]
    # The server holds back the entry of a token that ends within a character, and the next one takes its
    # place: letters only. The probabilities that it gives are those before the grammar.
    request = {"prompt": tokens, "max_tokens": 4, "temperature": 0, "logprobs": 50}
    request["grammar"] = "root ::= [a-z] [a-z] [a-z] [a-z]"
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    model = load(out)
    steps = answer["choices"][0]["logprobs"]["content"]
    assert len(steps) == 4
    for step in steps:
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        found = torch.tensor([entry["logprob"] for entry in step["top_logprobs"]])
        ids = torch.tensor([entry["id"] for entry in step["top_logprobs"]])
        torch.testing.assert_close(found, expected[ids], atol=0.02, rtol=0)  # its cache is in F16
        assert ids[0] == expected.argmax()
        tokens.append(step["id"])


def _convert(llama_cpp: Path, folder: Path, target: Path, options: list[str]) -> subprocess.CompletedProcess:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["th"] = 261  # llama.cpp refuses a tokenizer without any merge
    tokenizer["model"]["merges"] = [["t", "h"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = [sys.executable, "-c", CONVERT, str(llama_cpp), str(folder), "--outfile", str(target)]
    return subprocess.run(
        [*command, "--outtype", "f32", *options], capture_output=True, text=True, check=False
    )
