"""What stands on the screen: lines on their own, no bar that is left behind, nothing of libraries' own working."""

import io
import logging
import re
import sys
import warnings

import pytest
from tiny import HARD_PROMPT, sample_context
from transformers.utils import logging as transformers_logging

import h2s.run.terminal
from h2s import PrefixTuningPolicyModel
from h2s.prefix.adapter import SOFT
from h2s.run.folder import Run
from h2s.run.terminal import TerminalHandler, above_bars, any_letter, printable, progress_bar, quiet_libraries


class Screen(io.StringIO):
    """A terminal: what is written is drawn, at the cursor and over what stands there."""

    def __init__(self, terminal=True):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    @property
    def lines(self) -> list[str]:
        rows, row, column = [[]], 0, 0
        for piece in re.findall(r"\x1b\[A|[^\x1b]", self.getvalue()):
            if piece == "\x1b[A":
                row -= 1
            elif piece == "\n":
                row, column = row + 1, 0
                rows += [[]] * (row == len(rows))
            elif piece == "\r":
                column = 0
            else:
                rows[row] += " " * (column - len(rows[row]))
                rows[row][column : column + 1] = piece
                column += 1
        return [text for text in ("".join(cells).rstrip() for cells in rows) if text]


@pytest.fixture
def screen(monkeypatch):
    """Makes stdout and stderr one terminal, or one file."""

    def make(terminal=True):
        screen = Screen(terminal)
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(h2s.run.terminal, "BAR", {"leave": False, "delay": 0})
        monkeypatch.setattr(h2s.run.terminal, "EVERY", 0)
        return screen

    return make


LEFT = r", \d\d:\d\d left"
TRAINED = [rf"step 1 of 3: loss 1\.0{LEFT}", rf"step 2 of 3: loss \d\.\d{LEFT}", r"step 3 of 3: loss \d\.\d"]


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_a_run_is_a_line_a_log_step(build, screen, terminal, quiet):
    """No dict, nothing of what the trainer has no words for, and no bar once it is done."""
    screen = screen(terminal)
    build(losses=(1, 2, 3), rows=1, logging_steps=1, disable_tqdm=quiet).train()
    assert re.fullmatch("\n".join([*TRAINED, r"step 3 of 3: trained in 00:\d\d"]), "\n".join(screen.lines))
    assert ("3/3" in screen.getvalue()) == (terminal and not quiet)
    assert terminal or "\r" not in screen.getvalue()


def test_only_the_first_process_prints(build, screen):
    screen = screen()
    trainer = build()
    trainer.terminal.on_log(trainer.args, trainer.state, None, {"loss": 1.0, "train_runtime": 5.0})
    trainer.state.is_world_process_zero = False
    trainer.terminal.on_log(trainer.args, trainer.state, None, {"loss": 1.0, "train_runtime": 5.0})
    trainer.terminal.on_train_begin(trainer.args, trainer.state, None)
    assert trainer.terminal.training_bar.disable and screen.lines == ["trained in 00:05"]


def test_the_time_left_is_that_of_the_steps_that_this_process_made(build, screen, monkeypatch):
    """A resumed run has made others: 2 of 10 steps in 6 s, 4 are left."""
    screen, now = screen(), [100.0]
    trainer = build()
    trainer.state.global_step, trainer.state.max_steps = 4, 10
    monkeypatch.setattr(h2s.run.terminal.time, "monotonic", lambda: now[0])
    trainer.terminal.on_train_begin(trainer.args, trainer.state, None)
    trainer.state.global_step, now[0] = 6, 106.0
    trainer.terminal.on_log(trainer.args, trainer.state, None, {"loss": 1.0})
    assert screen.lines == ["step  6 of 10: loss 1.0, 00:12 left"]


def test_a_bar_goes_on_where_the_run_does(build, screen):
    build(losses=[1] * 2, disable_tqdm=False).train()
    screen = screen()
    build(losses=[1] * 4, disable_tqdm=False).train(resume_from_checkpoint=True)
    assert "2/4" in screen.getvalue() and "0/4" not in screen.getvalue()


def test_what_a_long_step_is_at(build, screen):
    screen = screen()
    trainer = build(disable_tqdm=False)
    trainer.terminal.doing("before there is a bar")
    trainer.terminal.on_train_begin(trainer.args, trainer.state, None)
    trainer.terminal.doing("sampling")
    assert screen.lines[-1].startswith("sampling: ")
    trainer.terminal.close()
    assert screen.lines == []


def test_an_error_stands_on_a_line_of_its_own(build, screen, capfd):
    """So does Ctrl-C's: the bar is gone by then."""
    screen = screen()
    trainer = build(disable_tqdm=False)

    def training_step(*args, **kwargs):
        assert "0%" in screen.lines[-1]  # the bar
        raise KeyboardInterrupt

    trainer.training_step = training_step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    Run().say("interrupted by Ctrl-C")
    assert screen.lines == ["interrupted by Ctrl-C"]


def test_lines_stand_above_a_bar_that_goes_on(screen):
    screen, logger = screen(), logging.getLogger("of this test")
    logger.addHandler(TerminalHandler(screen))
    for number in progress_bar(range(3), "long"):
        logger.warning("line %d", number)
        with above_bars():
            print("printed")
        assert screen.lines[-1].startswith("long: ") and screen.lines[-2] == "printed"
    assert screen.lines == ["line 0", "printed", "line 1", "printed", "line 2", "printed"]


def test_a_bar_in_a_log_file_is_lines(screen):
    screen = screen(terminal=False)
    assert list(progress_bar([7, 8, 9], "scoring")) == [7, 8, 9]
    assert re.sub(r"\d\d:\d\d left", "- left", screen.getvalue()) == (
        "scoring: 1 of 3, - left\nscoring: 2 of 3, - left\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_letters_that_a_terminal_lacks_are_no_error(monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你\n".encode()), encoding="ascii"))
    any_letter()
    print("5€ 你")
    out.flush()
    expected = {"ascii": b"5\\u20ac \\u4f60\n", "cp1252": b"5\x80 \\u4f60\n", "utf-8": "5€ 你\n".encode()}
    assert out.buffer.getvalue() == expected[encoding]
    assert input() == "".join(chr(0xDC00 + byte) for byte in "你".encode())  # which no conversation takes


def test_nothing_that_a_terminal_would_obey():
    assert printable("a\tb\n\x1b[2Jc\rd\x07 你 👨\u200d👩\x9b") == "a\tb\n\\x1b[2Jc\\rd\\x07 你 👨\u200d👩\\x9b"


@pytest.mark.parametrize(("label", "shown"), [(None, True), ("scoring", False)])
def test_no_bar_where_none_is_asked_for(screen, label, shown):
    screen = screen()
    assert list(progress_bar([7, 8], label, shown)) == [7, 8] and screen.getvalue() == ""


def test_libraries_are_quiet_where_nothing_is_wrong(gemma_folder, tmp_path):
    """Each warning is there without, so it has not been mended meanwhile."""

    def heard():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with quiet() if quiet else warnings.catch_warnings():
                policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT)
                policy.reply(sample_context(0), max_completion_length=1)
                policy.model.peft_config[SOFT].base_model_name_or_path = "google/gemma-3-1b-it"  # without network
                policy.model.save_pretrained(tmp_path)
                warnings.warn("ours", UserWarning, stacklevel=1)
        return sorted({str(w.message).split(" ")[0] for w in caught})

    quiet = None
    assert heard() == ["Could", "`is_gradient_checkpointing`", "ours"]
    quiet = quiet_libraries
    assert heard() == ["ours"]


def test_weights_that_load_at_once_need_no_bar(screen):
    screen, before = screen(), transformers_logging.get_verbosity()
    with quiet_libraries():
        list(transformers_logging.tqdm(range(3), desc="Loading weights"))
        assert screen.getvalue() == "" and transformers_logging.get_verbosity() == before
    list(transformers_logging.tqdm(range(3), desc="Loading weights"))
    assert "Loading weights" in screen.getvalue()
