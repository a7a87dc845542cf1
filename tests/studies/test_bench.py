"""`cbam bench`: the gate refuses wrong results, the rivals compute CBAM, times are ratios within a round."""

import csv
import platform
import subprocess
import sys
import textwrap
from itertools import count

import pytest
import torch

import cbam
from cbam.app.cli import main
from cbam.errors import ConfigError, OutputError
from cbam.studies import timing
from cbam.studies.bench import gate, rivals, run
from cbam.studies.bench.rows import Rows
from cbam.studies.bench.settings import Bench
from cbam.studies.timing import in_turns

CPU = torch.device("cpu")


def test_the_released_implementation_gives_our_output():
    ours, rival = cbam.CBAM(32, reduction=4), rivals.Released(32, reduction=4)
    for p in ours.parameters():
        torch.nn.init.normal_(p)
    names = {"fc1": "mlp.0", "fc2": "mlp.2", "conv": "conv", "bn": "bn"}
    for mine, theirs in names.items():
        part = ours.channel if mine.startswith("fc") else ours.spatial
        rival.get_submodule(theirs).load_state_dict(part.get_submodule(mine).state_dict())
    x = torch.randn(2, 32, 9, 7)
    torch.testing.assert_close(rival(x), ours(x), rtol=1e-5, atol=1e-5)


def test_both_block_tails_compute_the_same_function(kernels):
    plain, ours = rivals.Tail(8, cbam.CBAM(8)), rivals.OurTail(8, cbam.CBAM(8))
    ours.load_state_dict(plain.state_dict())
    x, shortcut = torch.randn(2, 3, 8, 5, 5)
    torch.testing.assert_close(ours(x, shortcut), plain(x, shortcut))


def test_the_gate_passes_the_plain_equation():
    assert gate.check(CPU, torch.float64) == 4 * len(gate.SHAPES) * 2


def test_the_gate_refuses_a_wrong_kernel(monkeypatch):
    class Wrong(cbam.CBAM):
        def forward(self, x):
            return super().forward(x) * (1 if x.dtype == torch.float64 else 1.001)

    monkeypatch.setattr(gate, "CBAM", Wrong)
    with pytest.raises(gate.GateError, match=r"the output is off by 1\.0e-03 of its scale"):
        gate.check(CPU, torch.float32)


def test_every_round_runs_every_step_and_ratios_are_to_the_first():
    told = []
    steps = {name: lambda name=name: told.append(name) for name in ("a", "b")}
    found = in_turns(steps, CPU, rounds=6, clock=count().__next__)  # a second each
    assert told[-4:] == ["a", "b", "b", "a"]
    assert len(found["b"].ms) == 6
    assert found["a"].ratios == [1.0] * 6


def test_a_short_step_is_repeated_within_a_round():
    told = []
    seconds = count(step=2**-8)
    (found,) = in_turns({"a": lambda: told.append(1)}, CPU, rounds=5, clock=lambda: next(seconds)).values()
    assert len(told) == 3 + 1 + 5 * 5  # warm-up, one to estimate the time, and 20 ms per round
    assert found.median == 1000 * 2**-8 / 5


def test_a_short_network_step_on_a_gpu_is_repeated_within_a_round(monkeypatch):
    monkeypatch.setattr(timing, "_is_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    told = []
    in_turns(
        {"a": lambda: told.append(1)}, CPU, rounds=5, least=timing.NETWORK, clock=lambda: 0.045 * len(told)
    )
    assert len(told) == 3 + 1 + 5 * 5


def test_the_time_of_a_graph_is_divided_by_its_number_of_steps(monkeypatch):
    def turns(graphs, device, **options):
        ms = {name: sum(graph()) for name, graph in graphs.items()}
        return {name: timing.Timed([value], [value / ms["copy"]]) for name, value in ms.items()}

    monkeypatch.setattr(timing, "in_turns", turns)
    steps = {"copy": lambda: 2.0, "kernel": lambda: 3.0}  # milliseconds
    assert timing.device_only(steps, CPU)["kernel"] == timing.Timed([3.0], [1.5])
    captured = timing.captured
    monkeypatch.setattr(timing, "captured", lambda step, device, times: captured(step, CPU, times))
    monkeypatch.setattr(timing, "_is_gpu", lambda device: device is not CPU)
    assert timing.device_only(steps, torch.device("cuda"))["kernel"] == timing.Timed([3.0], [1.5])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_costs_no_page_faults():
    program = """
        import resource, torch
        from cbam.studies.bench.run import _keep_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                torch.ones(20_000_000)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        given_back = faults()
        _keep_memory()
        assert any(faults() < 100 for _ in range(10)), "the heap never reaches its size"
        assert given_back > 100, given_back
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


def test_kept_memory_is_refused_without_glibc(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(ConfigError, match="keep_memory is a setting of glibc"):
        run.benchmark(Bench(device="cpu", keep_memory=True), print)


@pytest.fixture
def small(monkeypatch):
    """One tiny shape, and no network."""
    monkeypatch.setattr(run, "STAGES", ((4, 5),) * 3)
    monkeypatch.setattr(gate, "SHAPES", gate.SHAPES[:1])
    monkeypatch.setattr(run, "_can_compile", lambda device: False)
    monkeypatch.setattr(run._Measure, "network", lambda *args: ())


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_have_the_columns_that_a_reader_needs(tmp_path, small):
    said, kept = [], Rows(tmp_path / "new")
    settings = Bench(device="cpu", networks=("resnet_tiny",), batch_size=2, rounds=1)
    rows = run.benchmark(settings, said.append, kept.add)
    assert list((tmp_path / "new").iterdir()) == [kept.path]
    read_back = read(kept.path)
    assert {row["op"] for row in read_back} == {"attention", "end of a block"}
    assert {row["mode"] for row in read_back} == {"training", "inference"}
    assert {row["layout"] for row in read_back} == {"NCHW", "NHWC"}
    first = read_back[0]
    assert first["shape"] == "2x4x5x5"
    assert first["ratio"] == "1.0"
    assert all(first[name] for name in ("torch", "device", "dtype", "threads", "rounds", "ms"))
    assert said[0].endswith("results agree with the equation")
    assert len(said) == 1 + len(rows)


ROW = {
    "op": "attention", "implementation": "cbam", "shape": "8x4x7x7", "dtype": "float32", "layout": "NCHW",
    "mode": "inference", "ms": 1.0, "kernels": True, "threads": 2, "memory": "given back",
    "device": "A device (AVX2)", "torch": "2.15.0+cpu", "commit": "old",
}  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [{"op": "resnet18"}, {"shape": "8x9x7x7"}, {"dtype": "bfloat16"}, {"layout": "NHWC"},
     {"mode": "training"}, {"kernels": False}, {"threads": 1}],
)  # fmt: skip
def test_a_row_replaces_only_that_of_the_same_case(tmp_path, other):
    first = Rows(tmp_path)
    for row in (ROW, ROW | {"implementation": "timm"}, ROW | other):
        first.add(row)
    again = Rows(tmp_path)
    again.add(ROW | {"commit": "new", "note": "a column of a later version"})
    found = read(tmp_path / "A-device-AVX2-torch2.15.0.csv")
    assert [(row["commit"], row["note"]) for row in found] == [
        ("old", ""), ("new", "a column of a later version")
    ]  # fmt: skip
    assert {name: str(value) for name, value in (ROW | other).items()}.items() <= found[0].items()


def test_quick_rows_and_rows_with_kept_memory_have_their_own_files(tmp_path):
    for quick, memory in ((False, "given back"), (True, "given back"), (True, "kept")):
        Rows(tmp_path, quick=quick).add(ROW | {"memory": memory})
    name = "A-device-AVX2-torch2.15.0"
    assert sorted(path.stem for path in tmp_path.iterdir()) == [
        name, f"{name}-memory-kept-quick", f"{name}-quick"
    ]  # fmt: skip


def test_a_file_that_is_not_a_table_of_rows_is_left_alone(tmp_path):  # C7
    path = tmp_path / "A-device-AVX2-torch2.15.0.csv"
    path.write_text("something\nelse\n")
    with pytest.raises(OutputError, match="is not a table of `cbam bench`"):
        Rows(tmp_path).add(ROW)
    assert path.read_text() == "something\nelse\n"


def test_rows_measured_before_an_error_are_kept(tmp_path, small, monkeypatch, capsys):
    def network(*args):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(run._Measure, "network", network)
    given = ["bench", "--device", "cpu", "--batch-size", "2", "--rounds", "1", "--layouts", "NCHW"]
    main([*given, "--networks", "resnet_tiny", "--out", str(tmp_path / "out")])
    (path,) = (tmp_path / "out").iterdir()
    assert {row["op"] for row in read(path)} == {"attention", "end of a block"}
    assert f"Rows: {path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "code", "told"),
    [
        (["--networks", "resnet18", "resnt50"], 2, "unknown network 'resnt50'"),
        (["--networks", "vgg11"], 2, "vgg11: no place for attention"),
        (["--out", "file"], 2, "file is a file, not a folder"),
        (["--out", "/proc/self/nowhere"], 7, "cannot write to /proc/self/nowhere"),
    ],
)
def test_invalid_arguments_are_refused_before_the_gate(tmp_path, monkeypatch, capsys, given, code, told):
    # C1, C6, K16
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gate, "check", lambda *args: pytest.fail("the gate was run"))
    assert main(["bench", "--device", "cpu", *given]) == code
    assert told in capsys.readouterr().err


def test_bad_settings_are_reported_together():  # C3
    with pytest.raises(ConfigError, match=r"dtype must be .*; layouts must be .*; rounds must be"):
        Bench(dtype="int8", layouts=("CHWN",), rounds=0)


def test_the_command_refuses_invalid_options(capsys):  # C2, C8
    assert main(["bench", "--rouds", "3"]) == 2
    assert "did you mean --rounds?" in capsys.readouterr().err
    assert main(["bench", "--device", "tpu"]) == 2
    assert main(["bench", "--networks", "resnet5", "--device", "cpu"]) == 2
    assert main(["bench", "--layouts", "CHWN", "--device", "cpu"]) == 2
