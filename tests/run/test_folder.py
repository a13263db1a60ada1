"""A run's folder and log, and how a run ends: in one line, with an exit code that says whose fault it was."""

import logging
import os
import re
import shlex
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from transformers import TrainerState

import h2s.hub
import h2s.run.folder
from h2s.errors import InputError, PushError, RunError, Terminated
from h2s.run.arguments import (
    AdapterArguments,
    ConvertArguments,
    DatasetArguments,
    RewardDatasetArguments,
    RunArguments,
)
from h2s.run.callbacks import ReadableLog, StopOnSigterm
from h2s.run.folder import ONE_SIGNAL, WHERE_TO_PUSH, Run, StopRequest, run_recipe
from h2s.run.recipe import write_recipe

LOGGER = logging.getLogger("h2s")
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


def task(folder, name="first") -> RunArguments:
    return RunArguments(output_dir=str(folder), run_name=name)


def log_of(folder) -> str:
    return (folder / "train.log").read_text(encoding="utf-8")


@pytest.fixture
def run():
    run = Run()
    yield run
    run.close()


@pytest.fixture
def start(run, tmp_path):
    """Start the run `<tmp_path>/first`."""

    def make(dataset=None, name="first", **kwargs):
        return run.start(AdapterArguments(), dataset or DatasetArguments(), task(tmp_path, name), **kwargs)

    return make


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that began."""
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "train.log").write_text("hours of work\n", encoding="utf-8")
    return folder


# The folder


def test_start_makes_the_folder_and_writes_what_is_run(run, start, tmp_path):
    assert run.folder is None
    folder = start(DatasetArguments(path="a.json"))
    assert folder == run.folder == tmp_path / "first"
    assert {f.name for f in folder.iterdir()} == {"train.log", "recipe.yaml"}
    content = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert content["dataset"] == {"path": "a.json"} and content["task"]["run_name"] == "first"


def test_a_run_without_a_name_is_named_by_the_time(start, tmp_path):
    folder = start(name=None)
    assert folder.parent == tmp_path and re.fullmatch(r"\d{8}-\d{6}", folder.name)


def test_defaults_of_a_recipe_are_written(start):
    folder = start(test_size=0.2)
    assert yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["dataset"] == {"test_size": 0.2}


def test_a_folder_that_holds_something_is_not_written_over(run, start, begun):
    words = "first exists: choose another run_name"
    with pytest.raises(InputError, match=f"{words}, or go on with --resume_from_checkpoint true$"):
        start(resume=False)
    with pytest.raises(InputError, match=f"{words}$"):  # a recipe without checkpoints
        start()
    assert run.folder is None and log_of(begun) == "hours of work\n" and len(list(begun.iterdir())) == 1
    assert start(resume=True) == begun
    LOGGER.info("and on")
    assert re.fullmatch(f"hours of work\n{STAMP}and on\n", log_of(begun))


def test_an_empty_folder_is_taken(start, tmp_path):
    (tmp_path / "first").mkdir()
    assert start() == tmp_path / "first"


def test_a_run_is_resumed_with_the_split_that_it_began_with(start, begun):
    began, now = (RewardDatasetArguments(path="sheet.xlsx", folds=n) for n in (5, 4))
    start(now, resume=True)  # killed before it wrote its recipe
    write_recipe(begun / "recipe.yaml", AdapterArguments(), began, RunArguments())
    with pytest.raises(InputError, match="first began with folds 5, this run has 4: go on with the former"):
        start(now, resume=True)
    start(RewardDatasetArguments(path="moved.xlsx", folds=5), resume=True)


def test_a_folder_that_cannot_be_made_or_written(run, start, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"the run's folder cannot be made .*: choose another output_dir"):
        start(name="file/first")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(InputError, match="first cannot be written to: choose another output_dir"):
        start()
    assert run.folder is None and not LOGGER.handlers


# The log


def test_what_is_logged_and_where(run, start, capfd):
    folder = start()
    logging.getLogger("h2s.ppo.trainer").info("of a module: 你好")
    LOGGER.info("to the file", extra={"file_only": True})
    LOGGER.debug("a detail")
    run.say("a fault")
    captured = capfd.readouterr()
    assert captured.out == "of a module: 你好\n" and captured.err == "a fault\n"
    said = ["of a module: 你好", "to the file", "a detail", "a fault"]
    assert re.fullmatch("".join(f"{STAMP}{line}\n" for line in said), log_of(folder))


@pytest.mark.parametrize(
    ("rank", "everyone", "line"),
    [("0", False, "a fault\n"), ("0", True, "a fault\n"), ("1", False, ""), ("1", True, "process 1: a fault\n")],
)
def test_what_a_process_says(run, monkeypatch, capfd, rank, everyone, line):
    """Also before there is a folder."""
    monkeypatch.setenv("RANK", rank)
    run.say("a fault", everyone)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", line)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_says_what_is_refused_before_another_ends(monkeypatch, capfd, rank):
    """A launcher sends SIGTERM to all when one has ended: by then it must not be held up."""
    before, waited = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(time, "sleep", lambda seconds: waited.append((seconds, signal.getsignal(signal.SIGTERM))))

    @run_recipe
    def main(run, argv):
        raise InputError("no")

    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2 and waited == [(5, before)] * rank
    assert capfd.readouterr().err == ("" if rank else "error: no\n")


def test_only_the_main_process_writes(start, begun, monkeypatch, capfd):
    """It makes the folder, too, and finds what stands in the way."""
    monkeypatch.setattr(Run, "is_main_process", False)
    assert start() == begun
    LOGGER.info("twice")
    assert capfd.readouterr().out == ""
    assert log_of(begun) == "hours of work\n" and len(list(begun.iterdir())) == 1


def test_close_leaves_nothing_behind(run, start, capfd):
    before = list(LOGGER.handlers), LOGGER.propagate
    folder = start()
    (file,) = [h for h in LOGGER.handlers if isinstance(h, logging.FileHandler)]
    assert file.stream is not None and not LOGGER.propagate
    run.close()
    assert file.stream is None
    assert (LOGGER.handlers, LOGGER.propagate) == before == ([], True)
    LOGGER.info("afterwards")
    assert log_of(folder) == "" and capfd.readouterr().out == ""


def test_a_full_disk_does_not_end_a_run_at_a_log_line(run, start, capfd):
    start()
    (file,) = [h for h in LOGGER.handlers if isinstance(h, logging.FileHandler)]

    def full(text):
        raise OSError(28, "No space left on device")

    file.stream = SimpleNamespace(write=full, flush=lambda: None, close=lambda: None)
    LOGGER.info("a line")
    captured = capfd.readouterr()
    assert captured.out == "a line\n" and captured.err == ""


def test_readable_log(start, capfd):
    folder = start()
    logs = {"loss": 0.123456, "learning_rate": 1e-5, "epoch": 2, "note": "x"}
    ReadableLog().on_log(None, TrainerState(global_step=7), None, logs)
    ReadableLog().on_log(None, TrainerState(global_step=8), None)
    assert re.fullmatch(
        f"{STAMP}step 7: loss 0.1235  learning_rate 1e-05  epoch 2  note x\n{STAMP}step 8: \n", log_of(folder)
    )
    assert capfd.readouterr().out == ""  # Trainer prints them


@pytest.mark.parametrize(
    ("files", "holds"),
    [
        ([], "no checkpoint yet"),
        (["checkpoint-8/x", "checkpoint-16/x"], "checkpoint-16"),
        (["checkpoint-8/x", "adapter_model.safetensors"], "checkpoint-8, the kept adapter at its root"),
    ],
)
def test_how_to_go_on(run, start, files, holds):
    assert run.how_to_go_on() == "nothing was written"
    folder = start(resume=False)
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    assert run.how_to_go_on() == (
        f"{folder} holds {holds}: the same command with --output_dir {folder.parent} --run_name first "
        "--resume_from_checkpoint true goes on"
    )


def test_how_to_go_on_can_be_pasted_into_a_shell(run, tmp_path):
    folder = run.start(AdapterArguments(), DatasetArguments(), task(tmp_path / "my outputs", "it's 1"), resume=False)
    words = shlex.split(run.how_to_go_on().partition("the same command with ")[2])
    given = ["--output_dir", str(folder.parent), "--run_name", "it's 1", "--resume_from_checkpoint", "true"]
    assert words == [*given, "goes", "on"]


@pytest.mark.parametrize("name", ["hub_model_id", "hub_private_repo", "hub_revision"])
def test_where_to_push_has_no_effect_without_a_push(run, name):
    settings = SimpleNamespace(push_to_hub=False, **dict.fromkeys(WHERE_TO_PUSH) | {name: "x"})
    with pytest.raises(InputError, match=f"{name} would have no effect without push_to_hub: true"):
        run.check_push(settings, "me/base")


def test_a_recipe_without_checkpoints_starts_over(run, start):
    folder = start()
    assert run.how_to_go_on() == f"{folder} is unfinished: the same command with another run_name starts over"


# SIGTERM


def test_a_stop_request_waits_only_while_a_loop_can_save(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(h2s.run.folder.time, "monotonic", lambda: now[0])
    with pytest.raises(Terminated):
        StopRequest()(signal.SIGTERM, None)
    stop = StopRequest()
    stop.can_wait = True
    stop(signal.SIGTERM, None)
    assert stop.came_at == 100
    now[0] += ONE_SIGNAL - 0.1  # a launcher passes on what a scheduler sent to every process
    stop(signal.SIGTERM, None)
    now[0] += 0.2  # counted from the first
    with pytest.raises(Terminated):
        stop(signal.SIGTERM, None)


def test_callbacks_of_a_run(run):
    log, on_sigterm = run.callbacks()
    assert isinstance(log, ReadableLog) and isinstance(on_sigterm, StopOnSigterm) and on_sigterm.request is run.stop


# What goes to the Hub


@pytest.mark.parametrize(("asked", "first"), [("me/kind", "me/kind"), (None, "first")])
def test_a_run_pushes_its_folder_and_what_it_was_told_of(run, start, tmp_path, monkeypatch, asked, first):
    """Each to a repository of its own; nothing where the task asks for none."""
    done = []
    monkeypatch.setattr(h2s.hub, "check_push", lambda task, *args: done.append(args))
    monkeypatch.setattr(h2s.hub, "push_folders", lambda folders, task: done.append(folders))
    settings = ConvertArguments(output_dir=str(tmp_path), run_name="first")
    run.check_push(settings, "makers/gemma", "judge")
    folder = start()
    run.push(settings)
    assert done == [{}]
    settings.push_to_hub, settings.hub_model_id = True, asked
    run.check_push(settings, "makers/gemma", "judge")
    settings.push_to_hub = False  # so that a trainer does not
    run.push(settings)
    assert done[1:] == [
        ("makers/gemma", "first", ["", "-judge"]),
        {folder: first, folder / "judge": f"{first}-judge"},
    ]


# How a run ends


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def raises(error):
    def body():
        raise error

    return body


# What happens: exit code, the line on stderr with and without a run's folder.
ENDS = {
    "bad input": (raises(InputError("no such\n  file: a")), 2, "error: no such file: a", "error: no such file: a"),
    "escapes": (raises(InputError("odd \x1b[2J\u202e file")), 2, *["error: odd \\x1b[2J\\u202e file"] * 2),
    "Ctrl-C": (raises(KeyboardInterrupt()), 130, "interrupted by Ctrl-C; {on}", "interrupted by Ctrl-C; {none}"),
    "terminated": (raises(Terminated()), 143, "ended by SIGTERM; {on}", "ended by SIGTERM; {none}"),
    "SIGTERM itself": (sigterm, 143, "ended by SIGTERM; {on}", "ended by SIGTERM; {none}"),
    "fault of the run": (raises(RunError("the loss is nan")), 1, "error: the loss is nan; {on}", None),
    "a push": (raises(PushError("not pushed; this pushes it: …")), 1, *["error: not pushed; this pushes it: …"] * 2),
    "full disk": (raises(OSError(28, "No space")), 1, "error: OSError: [Errno 28] No space; {on}", None),
    "our bug": (raises(TypeError("an int\nis no str")), 1, "error: TypeError: an int is no str; {on}", None),
    "our bug with a value": (raises(ValueError("not 7")), 1, "error: ValueError: not 7; {on}", None),
    "torch's": (raises(RuntimeError("out of memory")), 1, "error: RuntimeError: out of memory; {on}", None),
}


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("case", ENDS)
def test_how_a_run_ends(tmp_path, capfd, case, begins):
    happens, code, with_folder, without = ENDS[case]
    runs = []

    @run_recipe
    def main(run, argv):
        runs.append((run, argv))
        assert signal.getsignal(signal.SIGTERM) is run.stop
        if begins:
            run.start(AdapterArguments(), DatasetArguments(), task(tmp_path), resume=False)
        happens()

    handler, logged = signal.getsignal(signal.SIGTERM), (list(LOGGER.handlers), LOGGER.propagate)
    line = with_folder if begins else without
    if line is None:  # left to Python: a traceback and exit code 1
        with pytest.raises((RunError, OSError, TypeError, ValueError, RuntimeError)) as error:
            main(["--a"])
        assert not isinstance(error.value, InputError)
        assert capfd.readouterr().err == ""
    else:
        with pytest.raises(SystemExit) as stop:
            main(["--a"])
        assert stop.value.code == code
        captured = capfd.readouterr()
        folder = tmp_path / "first"
        on = f"{folder} holds no checkpoint yet: the same command with --output_dir {tmp_path} --run_name first "
        line = line.format(on=f"{on}--resume_from_checkpoint true goes on", none="nothing was written")
        assert (captured.out, captured.err) == ("", f"{line}\n")
        if begins:
            assert re.search(f"{STAMP}{re.escape(line)}\n$", log_of(folder))
            assert ("Traceback" in log_of(folder)) == (code == 1)
    assert runs[0][1] == ["--a"]
    # Nothing of the run is left in the process.
    assert signal.getsignal(signal.SIGTERM) == handler
    assert (LOGGER.handlers, LOGGER.propagate) == logged == ([], True)


def test_ctrl_c_is_told_on_a_line_of_its_own(capfd, monkeypatch):
    """A terminal shows the keys themselves where its cursor is."""

    @run_recipe
    def main(run, argv=None):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        sys.stderr.write("^C")
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        main()
    assert capfd.readouterr().err == "^C\ninterrupted by Ctrl-C; nothing was written\n"


def test_a_run_that_is_done(tmp_path, capfd):
    @run_recipe
    def main(run, argv=None):
        """What it does."""
        run.start(AdapterArguments(), DatasetArguments(), task(tmp_path))
        LOGGER.info("done")

    assert main() is None and main.__doc__ == "What it does."
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("done\n", "")
    assert (LOGGER.handlers, LOGGER.propagate) == ([], True)


def test_an_exit_of_the_recipes_own_passes(capfd):
    """quickstart.py hands on the exit code of a stage."""

    @run_recipe
    def main(run, argv=None):
        raise SystemExit(3)

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 3 and capfd.readouterr().err == ""


# A bug of ours in a recipe: what of it, or of a module that it calls, breaks; and whether the run's folder is there.
BUGS = [
    ("train_policy", "h2s.data.datasets.read_context", False),
    ("train_policy", "h2s.prefix.opened.chat_prefix", False),
    ("train_policy", "h2s.reward.functions.read_adapter_config", False),
    ("train_reward", "h2s.data.datasets.read_reply", False),
    ("compare", "h2s.prefix.opened.read_adapter_config", False),
    ("convert_prompt", "h2s.prefix.opened.open_policy", False),
    ("convert_prompt", "difference_to_original", True),
    ("train_reward", "h2s.data.splits.split_for_models", False),
    ("train_reward", "h2s.report.accuracy.sheet_report", True),
    ("train_policy", "h2s.data.splits.split_by_conversation", False),
    ("train_policy", "h2s.SingleStepPPOTrainer", True),
    ("generate", "parse_messages", False),
    ("compare", "h2s.data.splits.split_by_conversation", False),
    ("compare", "h2s.report.strengths.along", True),
]


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, AttributeError, RuntimeError])
@pytest.mark.parametrize(("name", "breaks", "begun"), BUGS)
def test_a_bug_is_never_bad_input(recipes, write_recipe_of, monkeypatch, capfd, tmp_path, name, breaks, begun, error):
    def broken(*args, **kwargs):
        raise error("a bug")

    if breaks == "h2s.SingleStepPPOTrainer":
        broken.check = lambda *args: None
    where = (breaks,) if "." in breaks else (recipes[name], breaks)
    monkeypatch.setattr(*where, broken)
    config = write_recipe_of(name)
    if not begun:
        with pytest.raises(error, match="a bug"):
            recipes[name].main(["--config", str(config)])
        assert not (tmp_path / "outputs").exists()
        return
    with pytest.raises(SystemExit) as stop:
        recipes[name].main(["--config", str(config), "--run_name", "first"])
    assert stop.value.code == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {error.__name__}: {error('a bug')}; ")
    assert ("--resume_from_checkpoint true" in line) == name.startswith("train")
    assert "Traceback" in log_of(tmp_path / "outputs" / "first") and "in broken" in log_of(
        tmp_path / "outputs" / "first"
    )


def test_what_is_said_before_there_is_a_folder_is_heard(tmp_path, capfd):
    """In the log and the terminal of a run; where a recipe has none, at its end; not beside the line of bad input."""

    def recipe(run, argv):
        logger.warning("the header stands in row 3")
        logger.debug("not for people")
        if argv[0] == "refuse":
            raise InputError("no rows")
        if argv[0] == "run":
            run.start(AdapterArguments(), DatasetArguments(), RunArguments(output_dir=str(tmp_path), run_name="r"))

    logger = logging.getLogger("h2s.data.tables")
    run_recipe(recipe)(["run"])
    assert capfd.readouterr().out == "the header stands in row 3\n"
    assert (tmp_path / "r" / "train.log").read_text().count("the header stands in row 3") == 1
    run_recipe(recipe)(["none"])
    assert capfd.readouterr().err == "the header stands in row 3\n"
    with pytest.raises(SystemExit):
        run_recipe(recipe)(["refuse"])
    assert capfd.readouterr().err == "error: no rows\n"
