import io
import sys
from pathlib import Path

import pytest

from cbam.app import terminal


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("utf-8", "1.0 ± 0.2 µm\n"), ("ascii", "1.0 +- 0.2 ?m\n"), ("latin-1", "1.0 ± 0.2 µm\n")],
)
def test_characters_the_terminal_lacks_are_replaced(encoding, written):
    # C9
    out = stream(encoding)
    terminal.show("1.0 ± 0.2 µm", out)
    assert out.buffer.getvalue().decode(encoding) == written


def test_a_closed_or_absent_output_is_no_error(monkeypatch):
    # C9
    out = stream("utf-8")
    out.close()
    terminal.show("text", out)
    monkeypatch.setattr(sys, "stdout", None)
    terminal.show("text")
    assert isinstance(terminal.progress(), terminal.Lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_is_reported_once_and_training_continues(monkeypatch, capsys):
    # R14
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        watch = terminal.progress()
        for step in range(3):
            watch.say(f"step {step}")
            watch.now("a phase")
    told = "cbam: No space left on device: no more progress lines, the work continues\n"
    assert capsys.readouterr().err == told


def test_without_a_terminal_there_is_a_line_per_phase(capsys):
    # C9
    with terminal.progress() as watch:
        watch.now("seed 0: plain")
        watch.advance(0.5)
        watch.now("seed 0: CBAM")
        watch.say("a line")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[  0 %] seed 0: plain"
    assert lines[1].startswith("[ 50 %, 0:00 left] seed 0: CBAM")
    assert lines[2] == "a line"


@pytest.mark.parametrize(
    ("seconds", "shares", "left"),
    [(119.7, [0.5], "2:00"), (100, [0.1] * 3 + [0.7 + 1e-9], "0:00"), (3, [0.25], "0:09")],
)
def test_the_time_left_is_never_negative_nor_sixty_seconds(seconds, shares, left, monkeypatch, capsys):
    watch = terminal.Lines()
    for share in shares:
        watch.advance(share)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: watch.began + seconds)
    watch.now("the end")
    assert f" %, {left} left] the end" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("skipped", "done", "seconds", "left"),
    [
        (0.5, 0.25, 3600, ", 1:00:00 left"),
        (0.5, 0, 30, ""),
        (0, 0.001, 600, ", 166:30:00 left"),
        (0, 0.001, 9, ""),
    ],
)
def test_the_time_left_is_told_of_a_run_of_a_week_and_of_one_that_goes_on(
    skipped, done, seconds, left, monkeypatch, capsys
):
    watch = terminal.Lines()
    watch.skip(skipped)
    watch.advance(done)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: watch.began + seconds)
    watch.now("epoch 9")
    assert capsys.readouterr().out == f"[{100 * (skipped + done):3.0f} %{left}] epoch 9\n"


def test_in_a_terminal_there_is_one_bar_that_goes_away(monkeypatch):
    class Screen(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    with terminal.progress() as watch:
        assert isinstance(watch, terminal.Bar)
        watch.now("seed 0: plain [1]")
        watch.advance(0.25)
        watch.say("logits [bold]bit-equal[/bold]")
    written = screen.getvalue()
    assert "logits [bold]bit-equal[/bold]" in written
    assert "seed 0: plain (1]" in written
    assert "25%" in written
