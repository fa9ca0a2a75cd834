"""Skip, resume, refuse: the runner on a table of stub stages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from regrow import runner
from regrow.errors import RunError, UserError
from regrow.needs import check_share
from regrow.recipe import Recipe, parse_recipe
from regrow.stages import STAGES, Context, Stage


def make_recipe(**changes) -> Recipe:
    value = {
        "name": "stub",
        "model": "parent",
        "corpora": [{"source": "c.jsonl"}],
        "held_out": {"source": "h.jsonl"},
        "prune": {"width": 256},
    }
    return parse_recipe(value | changes, "stub.yaml")


class Calls:
    """Stub stages that log their runs; `fail_at` makes one of them die after it has written a file."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fail_at: str | None = None

    def stage(self, name: str, inputs: tuple[str, ...], reads: tuple[str, ...]) -> Stage:
        def run(context: Context) -> dict:
            self.log.append(name)
            (context.out / "result.txt").write_text(name)
            (context.work / "checkpoint").write_text("half way")
            if self.fail_at == name:
                raise RunError("The stub failed; mend it.")
            return {"seen": sorted(context.finished)}

        return Stage(name, inputs, reads, run)


@pytest.fixture
def calls(monkeypatch) -> Calls:
    calls = Calls()
    table = (
        calls.stage("first", (), ("prune", "corpora")),
        calls.stage("second", ("first",), ("seed",)),
        calls.stage("third", ("first", "second"), ("report",)),
    )
    monkeypatch.setattr(runner, "STAGES", table)
    monkeypatch.setattr(runner, "check_width", lambda recipe, parent: {})
    monkeypatch.setattr("regrow.modeling.sources.resolve_model", lambda source, revision=None: Path(source))
    monkeypatch.setattr("regrow.data.corpora.corpus_hash", lambda source, **_: f"hash of {source}")
    reader = type("Reader", (), {"__init__": lambda self, _: None, "fingerprint": lambda self: "f" * 64})
    monkeypatch.setattr("regrow.checkpoint.reader.CheckpointReader", reader)
    return calls


def test_runs_in_order_then_skips(calls, tmp_path):
    reports = runner.run_recipe(make_recipe(), tmp_path / "run")
    assert calls.log == ["first", "second", "third"]
    assert reports["third"]["seen"] == ["first", "second"]
    again = runner.run_recipe(make_recipe(), tmp_path / "run")
    assert calls.log == ["first", "second", "third"]
    assert again == reports


def test_text_is_written_by_the_parent_before_the_first_stage(calls, tmp_path, monkeypatch):
    def write(*, model, out, check_only=False, **options):
        if check_only:
            checked.append(out.name)
            return
        if fails:
            raise RunError("The disk is full.")
        calls.log.append(f"write {out.name}")
        written.append((model, options))
        out.mkdir(exist_ok=True)
        for name in ("train.jsonl", "held_out.jsonl", "report.json"):
            (out / name).write_text('{"text": "abc"}')

    written, checked, fails = [], [], []
    monkeypatch.setattr("regrow.synthesis.synthesize.synthesize", write)
    chat, other = tmp_path / "chat", tmp_path / "other"
    given = tmp_path / "given.jsonl"
    recipe = make_recipe(
        seed=3,
        enable_thinking=False,
        synthesize=[{"out": str(chat)}, {"out": str(other), "seed": 7, "attempts": 4}],
        corpora=[{"source": str(source)} for source in (chat / "train.jsonl", given, other / "train.jsonl")],
        held_out={"source": str(chat / "held_out.jsonl")},
    )
    with pytest.raises(UserError, match=r"given\.jsonl does not exist"):  # said before hours of writing
        runner.run_recipe(recipe, tmp_path / "run")
    assert calls.log == []
    given.write_text('{"text": "abc"}')
    fails.append(True)
    with pytest.raises(RunError):
        runner.run_recipe(recipe, tmp_path / "run")
    fails.clear()  # and the same command goes on
    runner.run_recipe(recipe, tmp_path / "run")
    assert checked == ["chat", "other"] * 3
    assert calls.log == ["write chat", "write other", "first", "second", "third"]
    assert [model for model, _ in written] == [Path("parent")] * 2
    seen = [{key: options[key] for key in ("seed", "attempts", "enable_thinking")} for _, options in written]
    assert seen == [
        {"seed": 3, "attempts": 1, "enable_thinking": False},
        {"seed": 7, "attempts": 4, "enable_thinking": False},
    ]


def test_text_is_not_written_over_the_run(calls, tmp_path):
    text = tmp_path / "text"
    recipe = make_recipe(synthesize=[{"out": str(text)}], held_out={"source": f"{text}/held_out.jsonl"})
    for run in (text, text / "run"):
        with pytest.raises(UserError, match="holds the run folder"):
            runner.run_recipe(recipe, run)
    assert not text.exists()


def test_what_an_entry_of_synthesize_says_is_what_the_function_takes():
    import inspect

    from regrow.recipe import Synthesize
    from regrow.synthesis.synthesize import synthesize

    taken = inspect.signature(synthesize).parameters
    for name, field in Synthesize.model_fields.items():
        assert name in taken
        if name not in ("out", "seed"):
            assert field.default == taken[name].default, name


def test_failed_stage_leaves_no_folder_and_the_rest_is_kept(calls, tmp_path):
    calls.fail_at = "second"
    with pytest.raises(RunError, match="stub failed"):
        runner.run_recipe(make_recipe(), tmp_path / "run")
    stages = tmp_path / "run" / "stages"
    assert sorted(path.name for path in stages.iterdir()) == ["first"]
    # The work folder survives, so that training can go on from its checkpoint.
    assert [path.name.split("-")[0] for path in (tmp_path / "run" / "work").iterdir()] == ["second"]
    calls.fail_at = None
    runner.run_recipe(make_recipe(), tmp_path / "run")
    assert calls.log == ["first", "second", "second", "third"]
    assert list((tmp_path / "run" / "work").iterdir()) == []


def test_changed_setting_is_refused_by_name_before_anything_runs(calls, tmp_path):
    runner.run_recipe(make_recipe(), tmp_path / "run")
    calls.log.clear()
    with pytest.raises(UserError) as caught:
        runner.run_recipe(make_recipe(prune={"width": 384}), tmp_path / "run")
    assert "recipe.prune.width (256 there, 384 now)" in str(caught.value)
    assert "--from first" in str(caught.value)
    assert calls.log == []


def test_from_redoes_a_stage_and_all_after_it(calls, tmp_path):
    runner.run_recipe(make_recipe(), tmp_path / "run")
    calls.log.clear()
    runner.run_recipe(make_recipe(seed=5), tmp_path / "run", start="second")
    assert calls.log == ["second", "third"]


def test_setting_of_a_later_stage_does_not_touch_earlier_ones(calls, tmp_path):
    runner.run_recipe(make_recipe(), tmp_path / "run")
    with pytest.raises(UserError, match=r"stage second .* recipe\.seed"):
        runner.run_recipe(make_recipe(seed=5), tmp_path / "run")


def test_until_stops(calls, tmp_path):
    runner.run_recipe(make_recipe(), tmp_path / "run", until="first")
    assert calls.log == ["first"]


def test_changed_corpus_is_noticed(calls, tmp_path, monkeypatch):
    runner.run_recipe(make_recipe(), tmp_path / "run")
    monkeypatch.setattr("regrow.data.corpora.corpus_hash", lambda source, **_: "other text")
    with pytest.raises(UserError, match=r"corpora\.corpora"):
        runner.run_recipe(make_recipe(), tmp_path / "run")


def test_foreign_folders_are_refused(calls, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match="no regrow run"):
        runner.run_recipe(make_recipe(), foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    runner.run_recipe(make_recipe(), tmp_path / "run")
    with pytest.raises(UserError, match="holds the run 'stub', not 'other'"):
        runner.run_recipe(make_recipe(name="other"), tmp_path / "run")


def test_damaged_manifest_is_refused(calls, tmp_path):
    runner.run_recipe(make_recipe(), tmp_path / "run")
    path = tmp_path / "run" / "stages" / "second" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"hash": "0"}))
    with pytest.raises(UserError, match="damaged"):
        runner.run_recipe(make_recipe(), tmp_path / "run")
    path.write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        runner.run_recipe(make_recipe(), tmp_path / "run")


def test_a_key_that_a_manifest_lacks_is_named(calls, tmp_path):
    runner.run_recipe(make_recipe(), tmp_path / "run")
    path = tmp_path / "run" / "stages" / "first" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["recipe"]["prune"].pop("shards") is None  # as an older version would have left it out
    path.write_text(json.dumps(manifest | {"hash": "0"}))
    with pytest.raises(UserError, match=r"recipe\.prune\.shards \(nothing there, None now\); redo it"):
        runner.run_recipe(make_recipe(), tmp_path / "run")


def test_second_process_is_refused(calls, tmp_path, monkeypatch):
    def run_again(context: Context) -> dict:
        with pytest.raises(UserError, match="Another regrow run"):
            runner.run_recipe(make_recipe(), context.run_dir)
        return {}

    monkeypatch.setattr(runner, "STAGES", (replace(runner.STAGES[0], run=run_again),))
    runner.run_recipe(make_recipe(), tmp_path / "run")


@pytest.mark.parametrize(("start", "until"), [("fourth", None), (None, "zero"), ("third", "first")])
def test_unknown_stage_names(calls, tmp_path, start, until):
    with pytest.raises(UserError, match=r"--from|--until"):
        runner.run_recipe(make_recipe(), tmp_path / "run", start=start, until=until)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def shares(calls, monkeypatch) -> list[int]:
    """The stub `second` can be shared; "processes" of it are calls in this one."""
    shares: list[int] = []

    def run_in_processes(function: str, arguments: dict, *, processes: int, folder: Path, what: str) -> dict:
        assert (function, what) == ("regrow.runner:run_share", "second")
        shares.append(processes)
        return runner.run_share(**json.loads(json.dumps(arguments)))

    first, second, third = runner.STAGES
    monkeypatch.setattr(runner, "STAGES", (first, replace(second, parallel=lambda recipe: True), third))
    monkeypatch.setattr(runner, "run_in_processes", run_in_processes)
    return shares


def test_processes_share_the_stages_that_can_be_shared(calls, shares, tmp_path, capsys):
    one = runner.run_recipe(make_recipe(device="cpu"), tmp_path / "one")
    assert shares == []
    assert "process" not in capsys.readouterr().err
    two = runner.run_recipe(make_recipe(device="cpu"), tmp_path / "two", processes=2)
    assert shares == [2]
    assert one == two
    said = capsys.readouterr().err.splitlines()
    assert said == ["== first in one process", "== second in 2 processes", "== third in one process"]
    assert (tmp_path / "two/stages/second/result.txt").read_text() == "second"
    # The result does not depend on it, so a finished run is one with any number.
    runner.run_recipe(make_recipe(device="cpu"), tmp_path / "two", processes=3)
    assert shares == [2]


@pytest.mark.parametrize(
    ("processes", "until", "device", "sentence"),
    [
        (0, None, "cpu", r"--processes 0: .* use 1 or more\.$"),
        (-2, None, "cpu", r"--processes -2: .* use 1 or more\.$"),
        (2, "first", "cpu", "--processes 2: this run has no stage that processes can share"),
        (5, None, "auto", r"--processes 5: .* PyTorch sees 4; use 4\.$"),
    ],
)
def test_processes_that_are_of_no_use(
    calls, shares, tmp_path, monkeypatch, processes, until, device, sentence
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match=sentence):
        runner.run_recipe(make_recipe(device=device), tmp_path / "run", until=until, processes=processes)
    assert calls.log == []
    assert not (tmp_path / "run").exists()


def test_which_stages_can_be_shared():
    training = {"max_steps": 1}
    sections = {
        "distill": training,
        "recover": training,
        "finish": training,
        "sft": training,
        "dpo": training,
    }

    def shared(recipe: Recipe) -> list[str]:
        return [stage.name for stage in STAGES if stage.enabled(recipe) and stage.parallel(recipe)]

    assert shared(make_recipe(**sections)) == ["calibrate", "distill", "recover", "finish"]
    vllm = {"finish": training | {"rollout_engine": "vllm"}, "calibrate": {"method": "sequential"}}
    assert shared(make_recipe(**sections | vllm)) == ["distill", "recover"]


def test_a_step_stays_what_the_recipe_says(monkeypatch, tmp_path):
    """Processes take their part of a step's micro-batches; what does not divide is refused."""
    seen = {}
    monkeypatch.setattr("regrow.training.distill.distill", lambda **options: seen.update(options) or {})
    distill = next(stage for stage in STAGES if stage.name == "distill")
    recipe = make_recipe(distill={"max_steps": 1, "gradient_accumulation_steps": 6})
    context = Context(recipe, tmp_path, tmp_path, tmp_path, tmp_path, {"prune": tmp_path}, processes=2)
    check_share(distill.name, recipe, 2)
    distill.run(context)
    assert seen["gradient_accumulation_steps"] == 3
    with pytest.raises(UserError, match=r"distill\.gradient_accumulation_steps is 6, .* multiple of 4"):
        check_share(distill.name, recipe, 4)
