"""A run folder for each test, filled from the fixture."""

import json
from pathlib import Path
from typing import Any

import pytest

from regrow.reporting.report import write_report
from unit.reporting.fixture import full_results

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1_280,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "vocab_size": 49_152,
}


Run = tuple[Path, str, str]


@pytest.fixture
def make_run(tmp_path):
    """Write results (and a model folder) and return the run's folder, card and page."""

    def make(results: Any, config: dict[str, Any] | None = None) -> Run:
        return _report(tmp_path / "run", results, config or CONFIG)

    return make


@pytest.fixture(scope="session")
def full_run(tmp_path_factory) -> Run:
    """Folder, card and page of the whole fixture; drawn once, to be read only."""
    return _report(tmp_path_factory.mktemp("full") / "run", full_results(), CONFIG)


def _report(run_dir: Path, results: Any, config: dict[str, Any]) -> Run:
    model = run_dir / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(config))
    (run_dir / "results.json").write_text(json.dumps(results))
    write_report(run_dir=run_dir)
    return run_dir, (model / "README.md").read_text(), (run_dir / "report.html").read_text()
