"""The machine is described without naming its owner."""

import getpass
import json
import os
import socket
from importlib.metadata import version

from regrow import __version__
from regrow.reporting.environment import describe_environment
from regrow.reporting.results import gather_results


def test_what_is_recorded():
    found = describe_environment()
    hardware, versions = found["hardware"], found["versions"]
    assert hardware["num_cores"] == len(os.sched_getaffinity(0))
    assert 2**28 < hardware["memory_bytes"] < 2**45
    assert isinstance(hardware["cpu"], str)
    assert isinstance(hardware["gpus"], list)
    assert versions["regrow"] == __version__
    assert versions["torch"] == version("torch")
    assert versions["transformers"] == version("transformers")
    text = json.dumps(found)
    for private in (socket.gethostname(), f"/{getpass.getuser()}", os.getcwd()):
        assert private not in text


def test_results_hold_every_stages_report(tmp_path):
    stages = {}
    for name, report in {
        "prune": {"notes": ["n"], "width": {"dense": 8}},
        "evaluate": {"models": {"teacher": {"fidelity": None}}, "final": "pruned"},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(report))
        (folder / "manifest.json").write_text(json.dumps({"seconds": 1.5, "hash": "h"}))
        stages[name] = folder
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "README.md").write_text("---\nlicense: mit\n---\n")
    results = gather_results(recipe={"model": "a/b"}, parent=parent, stages=stages)
    assert results["models"] == {"teacher": {"fidelity": None}}
    assert results["final"] == "pruned"
    assert results["notes"] == ["prune: n"]
    assert results["stages"]["prune"]["seconds"] == 1.5
    assert results["parent_card"]["license"] == "mit"
    assert "models" not in results["stages"]["evaluate"]["report"]
