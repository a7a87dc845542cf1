"""The command line: what it refuses, with which exit code, and how it ends (rows C1 to C12)."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cbam
from cbam.app import cli, options
from cbam.app.commands import networks
from cbam.errors import MissingExtraError
from cbam.studies.settings import Settings
from cbam.train.recipes import RECIPES, Config

ROOT = Path(cbam.__file__).parents[1]


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments: str, **how) -> subprocess.CompletedProcess:
    how.setdefault("stdout", subprocess.PIPE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    command = [sys.executable, *how.pop("python", []), "-m", "cbam", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, env=environment, timeout=120, **how)


BAD = [
    (["serve", "--port", "80000"], 2, "must be 1 to 65535"),
    ([], 2, "expected a command: compare, train"),
    (["compre"], 2, "invalid choice: 'compre'"),
    (["loook"], 2, "did you mean look?"),
    (["look", "a.png", "--method", "gradcma"], 2, "did you mean gradcam?"),
    (["look", "a.png", "--std", "0", "0", "0"], 2, "--std: must be a number above 0, at most 1, got '0'"),
    (["export", "a.pt", "--to", "onnx", "--mean", "124", "116", "104"], 2, "--mean: must be a number from 0"),
    (["--verson"], 2, "unknown option --verson; did you mean --version?"),
    (["-z"], 2, "-z"),
    (["compare", "--epoch", "3"], 2, "unknown option --epoch; did you mean --epochs?"),
    (["compare", "--epoch=3"], 2, "did you mean --epochs?"),
    (["compare", "--atention", "se"], 2, "did you mean --attention?"),
    (["compare", "--quick"], 2, "unknown option --quick"),
    (["compare", "a", "b"], 2, "unrecognized arguments: b"),
    (["compare", "--epochs"], 2, "--epochs: expected one argument"),
    (["compare", "--epochs", "many"], 2, "must be a whole number, got 'many'"),
    (["compare", "--epochs", "1.5"], 2, "must be a whole number"),
    (["compare", "--epochs", "0"], 2, "epochs must be a whole number above 0"),
    (["compare", "--epochs", "-3"], 2, "epochs must be a whole number above 0"),
    (["compare", "--seeds", "0"], 2, "seeds must be"),
    (["compare", "--batch-size", "0"], 2, "batch_size must be"),
    (["compare", "--lr", "fast"], 2, "must be a number, got 'fast'"),
    (["compare", "--lr", "nan"], 2, "lr must be a number above 0"),
    (["compare", "--lr", "inf"], 2, "lr must be a number above 0"),
    (["compare", "--lr", "-1"], 2, "lr must be a number above 0"),
    (["compare", "--workers", "-1"], 2, "workers must be 0 to 1024"),
    (["compare", "--size", "64"], 2, "size applies to image folders only"),
    (["compare", "--limit", "0"], 2, "limit must be"),
    (["compare", "--device", "gpu"], 2, "device must be auto, cpu or cuda"),
    (["compare", "--device", "cuda:7"], 2, "device must be auto, cpu or cuda"),
    (["compare", "--attention", "cbm"], 2, "unknown attention 'cbm'; nearest: cbam"),
    (["compare", "--attention", "se", "se"], 2, "twice"),
    (["compare", "--attention"], 2, "expected at least one argument"),
    (["compare", "--model", "resnt_tiny"], 2, "unknown network 'resnt_tiny'; nearest: resnet_tiny"),
    (["compare", "--model", "resnet18+cbam"], 2, "must be the plain network"),
    (["compare", "--model", ""], 2, "model must be a non-empty string"),
    (["compare", "--from-scratch", "--pretrained", "a"], 2, "exclude each other"),
    (["compare", "--from-scratch=yes"], 2, "ignored explicit argument 'yes'"),
    (["compare", "--pretrained", "nowhere.pth"], 4, "nowhere.pth"),
    (["compare", "--pretrained", "."], 4, ""),
    (["compare", "--pretrained", "text.pth"], 4, "text.pth"),
    (["compare", "--config", "nowhere.yaml"], 2, "config nowhere.yaml: No such file"),
    (["compare", "--config", "."], 2, "config .: Is a directory"),
    (["compare", "--config", "bad.yaml"], 2, "did you mean 'epochs'?"),
    (["compare", "--out", "full"], 2, "full is not empty: give another --out, or --overwrite"),
    (["compare", "--out", "text.pth"], 2, "text.pth is a file"),
    (["compare", "--out", "text.pth/below"], 7, "cannot write to text.pth/below"),
    (["compare", "--out", "/proc/self/nowhere"], 7, "cannot write to"),
    (["compare", "--out", "x" * 300], 7, "File name too long"),
    (["compare", "nowhere"], 3, "nowhere"),
    (["compare", "empty"], 3, "empty"),
    (["compare", "text.pth"], 3, "text.pth"),
    (["compare", "one_class"], 3, "one_class"),
    (["compare", "nul\0byte"], 3, ""),
    (["train"], 2, "the following arguments are required: RECIPE"),
    (["train", "digit"], 2, "unknown recipe 'digit'; did you mean 'digits'?"),
    (["train", "digits", "--epoch", "3"], 2, "did you mean --epochs?"),
    (["train", "digits", "--lr", "fast"], 2, "must be a number, got 'fast'"),
    (["train", "digits", "--epochs", "0"], 2, "epochs must be a positive int"),
    (["train", "digits", "--model", "resnt_tiny"], 2, "unknown network 'resnt_tiny'; nearest: resnet_tiny"),
    (["train", "digits", "full"], 2, "makes its own images"),
    (["train", "digits", "--device", "gpu"], 2, "device must be auto, cpu or cuda"),
    (["train", "digits", "--config", "bad.yaml"], 2, "did you mean 'epochs'?"),
    (["train", "digits", "--max-time", "soon"], 2, "must be a time such as 90m, 11.5h or 11:30:00"),
    (["train", "digits", "--resume", "nowhere.ckpt", "--out", "new"], 4, "nowhere.ckpt: no such file"),
    (["train", "digits", "--resume", "text.pth", "--out", "new"], 4, "probably a web page"),
    (["train", "digits", "--limit", "9", "--out", "text.pth/below"], 7, "cannot write to text.pth/below"),
    (["train", "folder"], 2, "the recipe folder needs DATA"),
    (["train", "folder", "nowhere"], 3, "nowhere"),
    (["train", "folder", "empty"], 3, "empty"),
    (["eval", "nowhere.ckpt"], 4, "nowhere.ckpt: no such file"),
    (["eval", "text.pth"], 4, "probably a web page"),
    (["eval", "text.pth", "--model", "resnet_tiny"], 4, "text.pth"),
    (["eval", "full"], 4, "no checkpoint in this folder"),
    (["eval", "text.pth", "--batch-size", "0"], 2, "must be a whole number above 0"),
    (["recipes", "a"], 2, "unrecognized arguments: a"),
    (["list", "resnt"], 2, "no network matches 'resnt'; nearest: resnet"),
    (["list", "a", "b"], 2, "unrecognized arguments: b"),
    (["eval", "a", "--device", "cpu", "b", "c"], 2, "unrecognized arguments: c"),
    (["sites"], 2, "the following arguments are required: NAME"),
    (["sites", "resnt18"], 2, "unknown network 'resnt18'; nearest: resnet18"),
    (["export", "resnet_tiny"], 2, "the following arguments are required: --to"),
    (["export", "resnt18", "--to", "torch"], 2, "unknown network 'resnt18'; nearest: resnet18"),
    (["export", "gone.pth", "--to", "torch"], 4, "gone.pth: no such file"),
    (["export", "text.pth", "--to", "torch"], 4, "probably a web page"),
    (["export", "text.pth", "--to", "torch", "--model", "resnet_tiny"], 4, "text.pth"),
    (["export", "resnet_tiny", "--to", "torch", "--model", "resnet18"], 2, "--model needs a weights file"),
    (["export", "x" * 300, "--to", "torch"], 2, "x" * 80),  # too long a file name, or from 3.14 no network
    (["export", "nul\0byte", "--to", "torch"], 2, "nul"),
    (["export", "full", "--to", "torch"], 4, "no checkpoint in this folder"),
    (["export", "full", "--to", "torch", "--num-classes", "3"], 2, "omit --model and --num-classes"),
    (["export", "resnet_tiny", "--to", "torch", "--out", "text.pth"], 2, "text.pth exists"),
    (["export", "resnet_tiny", "--to", "torch", "--out", "a.onnx"], 2, "a file for torch must end in .pt2"),
    (["export", "resnet_tiny", "--to", "torch", "--out", "no/a.pt2"], 7, "cannot be written"),
    (["export", "resnet_tiny", "--to", "torch", "--opset", "18"], 2, "opset is an ONNX setting"),
    (["sites", "tim:resnet18"], 2, "unknown library 'tim'"),
]


@pytest.mark.parametrize(("arguments", "code", "told"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_and_its_exit_code(arguments, code, told, tmp_path, capsys):
    # C1, C2, C3, C6, C7, C12
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "one_class" / "cat").mkdir(parents=True)
    (tmp_path / "one_class" / "cat" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "text.pth").write_text("<html>")
    (tmp_path / "bad.yaml").write_text("ephocs: 3")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert err.startswith("cbam: ")
    assert err.count("\n") == 1
    assert told in err
    assert "Traceback" not in out + err
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_the_traceback(capsys):
    # C1
    assert cli.main(["sites", "resnt18", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_missing_cuda_is_refused_at_the_start(monkeypatch, capsys):
    # C8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["compare", "--device", "cuda"]) == 2
    assert "no usable GPU here" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_pip_line_before_any_work(monkeypatch, capsys):
    # C5
    find, absent = importlib.util.find_spec, ("torchcam", "pytorch_lightning")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    assert cli.main(["compare"]) == MissingExtraError.exit_code == 8
    err = capsys.readouterr().err
    line = "pip install 'cbam[train,explain]', or in a checkout pip install '.[train,explain]'"
    assert err.endswith(f" needs optional packages (pytorch_lightning, torchcam missing): {line}\n")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 6, "a smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6, "out of memory"),
        (OSError(28, "No space left on device"), 7, "No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (options.Terminated(), 143, "terminated"),
        (ZeroDivisionError("division\nby zero"), 1, "ZeroDivisionError: division by zero"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_every_kind_of_failure_has_its_exit_code(error, code, told, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr(networks, "run", fail)
    monkeypatch.setattr(cli, "silence", lambda stream: None)
    assert cli.main(["list"]) == code
    err = capsys.readouterr().err
    assert told in err
    assert "Traceback" not in err


def test_list_and_sites_print_what_the_library_finds(capsys):
    assert cli.main(["list", "resnet_t*"]) == 0
    assert capsys.readouterr().out == "resnet_tiny\n"
    assert cli.main(["sites", "resnet_tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["layer1.0", "16"],
        ["layer2.0", "32"],
        ["layer3.0", "64"],
    ]
    assert cli.main(["sites", "mobilenet_v2"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()[:3]
    assert first.split() == "features.1 left out: no skip connection".split()
    assert third.split()[:3] == ["features.3", "24", "channels"]
    assert second.index("left out") == third.index("attention")
    assert all("attention:" in line for line in lines)


def test_a_config_is_read_and_the_command_line_wins(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 3\nseeds: 2\nattention: [cbam]\n")
    given = options.given(cli.parse(["compare", "--config", "c.yaml", "--seeds", "5"]), Settings)
    settings = Settings(**given)
    assert (settings.epochs, settings.seeds, settings.attention) == (3, 5, ("cbam",))


@pytest.mark.parametrize(
    "line",
    [
        "train folder pics --epochs 3 --seed 5",
        "train folder --epochs 3 pics --seed 5",
        "train folder --epochs 3 --seed 5 pics",
        "train --epochs 3 folder --seed 5 pics",
        "train --epochs 3 --seed 5 folder pics",
    ],
)
def test_options_may_come_before_between_or_after_names(line):
    given = options.given(cli.parse(line.split()), Config)
    assert given == {"recipe": "folder", "data": "pics", "epochs": 3, "seed": 5}


def test_options_may_mix_with_names_in_other_commands_too():
    for line in ("run pics --device cpu", "run --device cpu pics", "--device cpu run pics"):
        found = cli.parse(["eval", *line.split()])
        assert (found.file, found.data, found.device) == ("run", "pics", "cpu")
    assert cli.parse(["eval", "run", "--device", "cpu"]).data is None
    for line in ("a b --limit 2", "a --limit 2 b", "--limit 2 a b"):
        assert cli.parse(["look", *line.split()]).images == ["a", "b"]
    assert cli.parse(["study", "order", "--plan", "peers"]).name == ["order", "peers"]
    assert options.given(cli.parse(["compare", "--seeds", "2", "pics"]), Settings)["data"] == "pics"


def test_the_help_names_every_command_and_every_command_has_a_help(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n    {name} " in out
        assert cli.main([name, "--help"]) == 0
        assert "--debug" in capsys.readouterr().out


def test_help_and_version_answer_at_once_without_torch():
    # C11
    for arguments in (["--version"], ["--help"], ["compare", "--help"]):
        began = time.perf_counter()
        done = run(*arguments, python=["-X", "importtime"])
        seconds = time.perf_counter() - began
        assert done.returncode == 0
        assert b"torch" not in b"".join(line.split(b"|")[-1] for line in done.stderr.splitlines())
        assert seconds < 3  # 0.1 on an idle machine
    assert b"--pretrained" in done.stdout


def test_a_broken_pipe_or_closed_stream_is_no_error():
    # C9
    read, write = os.pipe()
    os.close(read)
    done = run("--help", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run(
        f"exec {sys.executable} -m cbam --version <&- >&-",
        shell=True,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        timeout=60,
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)


def test_ctrl_c_ends_a_run_with_130_and_leaves_nothing_half_done(tmp_path):
    # C10, R18
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "cbam", "compare", "--limit", "30", "--epochs", "500", "--out", "out"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        cwd=tmp_path,
        # A shell starts background jobs deaf to Ctrl-C, and they hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if "before the fork" in line:
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 130
        finally:
            process.kill()
        told = process.stderr.read()
        assert told.endswith("cbam: interrupted\n")
        assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_inside_an_exec_of_text_is_the_same_exit_code(tmp_path):
    # C10, R18: CPython would let `python -m` die by the signal
    trial = """
import argparse, sys
from cbam.app import cli

def run(_):
    exec("raise KeyboardInterrupt")

cli.parse = lambda _: argparse.Namespace(run=run)
sys.exit(cli.main([]))
"""
    (tmp_path / "interrupted_trial.py").write_text(trial, "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "interrupted_trial"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "cbam: interrupted\n")


def test_ctrl_c_at_startup_is_reported_as_later(tmp_path):
    # C10: while the command line itself is still being imported
    trial = """
import sys

class Interrupts:
    def find_spec(name, path=None, target=None):
        if name == "cbam.app.cli":
            exec("raise KeyboardInterrupt")

sys.meta_path.insert(0, Interrupts)
"""
    (tmp_path / "sitecustomize.py").write_text(trial, "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "cbam", "list"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "cbam: interrupted\n")


def test_train_is_stopped_resumed_and_evaluated(tmp_path, capsys):
    # R19
    small = ["--limit", "24", "--epochs", "2", "--batch-size", "8", "--device", "cpu"]
    assert cli.main(["train", "digits", *small, "--out", "run", "--max-time", "0s"]) == 75
    assert "stopped by the time limit after 1 of 3 steps of epoch 0" in capsys.readouterr().err
    assert cli.main(["train", "digits", "--out", "run"]) == 2
    assert "--resume auto continues" in capsys.readouterr().err
    assert cli.main(["train", "digits", "--out", "run", "--resume", "auto", "--lr", "0.2"]) == 2
    assert "lr 0.05 -> 0.2" in capsys.readouterr().err
    assert cli.main(["train", "digits", "--out", "run", "--resume", "auto"]) == 0
    done = capsys.readouterr().out.splitlines()[-1]
    assert cli.main(["eval", "run", "--device", "cpu"]) == 0
    score = capsys.readouterr().out
    assert score.startswith("resnet_tiny+cbam on 20 validation images of cluttered_digits: top-1 error ")
    assert done.split("%")[0].split()[-1] == score.split("%")[0].split()[-1]
    assert cli.main(["train", "digits", "--config", "run/config.json", "--out", "again"]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        tmp_path / "again" / "metrics.jsonl"
    ).read_text()


def test_the_recipes_are_listed(capsys):
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert "imagenet/paper" in out
    assert "resnet50+cbam, 90 epochs, batch 256, sgd lr 0.1 step, weight decay 0.0001" in out
    lines = out.splitlines()
    for name, line, below in zip(RECIPES, lines[::2], lines[1::2], strict=True):
        assert line.startswith(f"{name}  ")  # the longest name, too, stands apart from its text
        assert len(below) - len(below.lstrip()) == len(lines[1]) - len(lines[1].lstrip())


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("90m", 5400), ("11.5h", 41400), ("11:30:00", 41400), ("0:00:05", 5)]
)
def test_a_duration_is_read_in_common_notations(text, seconds):
    assert options.duration(text) == seconds


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.large),
    ],  # see test_processes.py
)
def test_a_signal_saves_and_a_second_run_is_refused(number, code, tmp_path):
    # R17, R18, R21
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    train = [
        sys.executable,
        "-m",
        "cbam",
        "train",
        "digits",
        "--device",
        "cpu",
        "--save-every",
        "2",
        "--out",
        "run",
    ]
    with subprocess.Popen(train, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("run/step-*.ckpt")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert cli.main(["train", "digits", "--limit", "9", "--out", "run"]) == 2
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"--resume auto continues" in err
    assert err.count(b"cbam: ") == 1
    assert b"Traceback" not in err
    assert not (tmp_path / "run" / "lock").exists()
