"""Two processes on the CPU (gloo) train as one does, and a run may go on with another number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regrow.training.distill import distill
from training_case import QUICK, assert_close, make_case

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from regrow.training.distill import distill
torch.set_num_threads(1)
arguments = json.loads(Path(sys.argv[1]).read_text())
for name in ("student", "teacher", "out", "work_dir"):
    arguments[name] = Path(arguments[name])
report = distill(**arguments)
if os.environ["RANK"] == "0":
    Path(sys.argv[2]).write_text(json.dumps(report))
torch.distributed.destroy_process_group()
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SETTINGS = QUICK | {"precision": "fp32", "tokens": "response", "batch_tokens": 128}


def launch(folder: Path, processes: int, arguments, launcher=(), environment=None):
    """Run `distill` under torchrun; returns its report."""
    script, given, report = folder / "script.py", folder / "arguments.json", folder / "report.json"
    script.write_text(SCRIPT)
    given.write_text(json.dumps(arguments, default=str))
    starter = launcher or (
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--standalone",
    )
    finished = subprocess.run(
        [sys.executable, "-m", *starter, str(script), str(given), str(report)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(report.read_text())


def test_two_processes_equal_one(tmp_path):
    case = make_case(tmp_path)
    # One process accumulates what two take side by side.
    one = distill(
        **case,
        out=tmp_path / "one",
        work_dir=tmp_path / "w1",
        **SETTINGS | {"gradient_accumulation_steps": 2},
    )
    two = launch(tmp_path, 2, {**case, "out": tmp_path / "two", "work_dir": tmp_path / "w2", **SETTINGS})
    assert two["world_size"] == 2
    for curve, figure in (("losses", "loss"), ("held_out", "kl"), ("held_out", "top1_agreement")):
        left, right = ([entry[figure] for entry in report[curve]] for report in (one, two))
        assert right == pytest.approx(left, rel=1e-4), curve
    for count in ("num_tokens", "num_response_tokens", "num_loss_tokens", "padding_efficiency"):
        assert one[count] == two[count], count
    assert_close(tmp_path / "one", tmp_path / "two", case["student"])


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Four steps on two processes, the rest on one that accumulates twice as much."""
    case = make_case(tmp_path)
    accumulating = SETTINGS | {"gradient_accumulation_steps": 2}
    distill(**case, out=tmp_path / "one", work_dir=tmp_path / "w1", **accumulating)
    work = tmp_path / "w2"
    launch(tmp_path, 2, {**case, "out": tmp_path / "two", "work_dir": work, **SETTINGS})
    for path in sorted((work / "checkpoint-6").rglob("*")):
        path.unlink()
    (work / "checkpoint-6").rmdir()  # as if it had been killed after step 4
    report = distill(**case, out=tmp_path / "resumed", work_dir=work, **accumulating)
    assert (report["steps"], report["world_size"]) == (6, 1)
    assert_close(tmp_path / "one", tmp_path / "resumed", case["student"])


@pytest.mark.parametrize("mode", ["cached", "sampled"])
def test_stores_are_filled_by_all_processes(tmp_path, mode):
    case = make_case(tmp_path)
    cached = SETTINGS | {"teacher_mode": mode, "precision": "bf16_mixed"}
    one = distill(
        **case,
        out=tmp_path / "one",
        work_dir=tmp_path / "w1",
        **cached | {"gradient_accumulation_steps": 2},
    )
    two = launch(tmp_path, 2, {**case, "out": tmp_path / "two", "work_dir": tmp_path / "w2", **cached})
    assert [e["loss"] for e in two["losses"]] == pytest.approx([e["loss"] for e in one["losses"]], rel=0.02)


def test_sharded_weights_equal_whole_ones(tmp_path):
    """FSDP2 from an accelerate config, student and teacher sharded over two processes."""
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    case = make_case(tmp_path)
    one = distill(
        **case,
        out=tmp_path / "one",
        work_dir=tmp_path / "w1",
        **SETTINGS | {"gradient_accumulation_steps": 2},
    )
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "ACCELERATE_USE_CPU": "true",
    }
    arguments = {**case, "out": tmp_path / "two", "work_dir": tmp_path / "w2", **SETTINGS}
    two = launch(tmp_path, 2, arguments, environment=environment)
    left, right = ([entry["loss"] for entry in report["losses"]] for report in (one, two))
    assert right == pytest.approx(left, rel=1e-4)
    assert_close(tmp_path / "one", tmp_path / "two", case["student"])
