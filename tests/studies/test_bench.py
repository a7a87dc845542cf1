"""`cbam bench`: the gate refuses what is wrong, the rivals compute CBAM, times are ratios of a round."""

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
from cbam.errors import ConfigError
from cbam.studies import timing
from cbam.studies.bench import gate, rivals, run
from cbam.studies.bench.settings import Bench
from cbam.studies.timing import in_turns

CPU = torch.device("cpu")


def test_the_released_way_of_computing_is_ours():
    ours, rival = cbam.CBAM(32, reduction=4), rivals.Released(32, reduction=4)
    for p in ours.parameters():
        torch.nn.init.normal_(p)
    names = {"fc1": "mlp.0", "fc2": "mlp.2", "conv": "conv", "bn": "bn"}
    for mine, theirs in names.items():
        part = ours.channel if mine.startswith("fc") else ours.spatial
        rival.get_submodule(theirs).load_state_dict(part.get_submodule(mine).state_dict())
    x = torch.randn(2, 32, 9, 7)
    torch.testing.assert_close(rival(x), ours(x), rtol=1e-5, atol=1e-5)


def test_the_ends_of_a_block_are_the_same_function(kernels):
    plain, ours = rivals.Tail(8, cbam.CBAM(8)), rivals.OurTail(8, cbam.CBAM(8))
    ours.load_state_dict(plain.state_dict())
    x, shortcut = torch.randn(2, 3, 8, 5, 5)
    torch.testing.assert_close(ours(x, shortcut), plain(x, shortcut))


def test_the_gate_lets_the_equation_through():
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
    assert len(told) == 3 + 1 + 5 * 5  # warm-up, one to see how long it takes, and 20 milliseconds a round
    assert found.median == 1000 * 2**-8 / 5


def test_a_step_of_a_network_is_repeated_on_a_gpu_until_one_per_cent_shows(monkeypatch):
    monkeypatch.setattr(timing, "_is_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    told = []
    in_turns(
        {"a": lambda: told.append(1)}, CPU, rounds=5, least=timing.NETWORK, clock=lambda: 0.045 * len(told)
    )
    assert len(told) == 3 + 1 + 5 * 5


def test_the_time_of_a_graph_is_that_of_each_of_its_steps(monkeypatch):
    def turns(graphs, device, **options):
        ms = {name: sum(graph()) for name, graph in graphs.items()}
        return {name: timing.Timed([value], [value / ms["copy"]]) for name, value in ms.items()}

    monkeypatch.setattr(timing, "in_turns", turns)
    steps = {"copy": lambda: 2.0, "kernel": lambda: 3.0}  # milliseconds
    assert timing.without_host(steps, CPU)["kernel"] == timing.Timed([3.0], [1.5])
    captured = timing.captured
    monkeypatch.setattr(timing, "captured", lambda step, device, times: captured(step, CPU, times))
    monkeypatch.setattr(timing, "_is_gpu", lambda device: device is not CPU)
    assert timing.without_host(steps, torch.device("cuda"))["kernel"] == timing.Timed([3.0], [1.5])


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
        assert any(faults() < 100 for _ in range(10)), "the heap never has its size"
        assert given_back > 100, given_back
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


def test_kept_memory_is_refused_where_it_cannot_be_had(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(ConfigError, match="keep_memory is a setting of glibc"):
        run.benchmark(Bench(device="cpu", keep_memory=True), print)


def test_rows_hold_what_a_reader_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "STAGES", ((4, 5),))
    monkeypatch.setattr(gate, "SHAPES", gate.SHAPES[:1])
    monkeypatch.setattr(run, "_can_compile", lambda device: False)
    monkeypatch.setattr(run._Measure, "network", lambda *args: ())
    said = []
    rows = run.benchmark(Bench(device="cpu", batch_size=2, rounds=1), said.append)
    path = run.write(rows, tmp_path / "new")
    with path.open() as file:
        read = list(csv.DictReader(file))
    assert {row["op"] for row in read} == {"attention", "end of a block"}
    assert {row["mode"] for row in read} == {"training", "inference"}
    assert {row["layout"] for row in read} == {"NCHW", "NHWC"}
    first = read[0]
    assert first["shape"] == "2x4x5x5"
    assert first["ratio"] == "1.0"
    assert all(first[name] for name in ("torch", "device", "dtype", "threads", "rounds", "ms"))
    assert said[0].endswith("results equal the equation")
    assert len(said) == 1 + len(rows)


def test_bad_settings_are_told_together():  # C3
    with pytest.raises(ConfigError, match=r"dtype must be .*; layouts must be .*; rounds must be"):
        Bench(dtype="int8", layouts=("CHWN",), rounds=0)


def test_the_command_refuses_before_it_measures(capsys):  # C2, C8
    assert main(["bench", "--rouds", "3"]) == 2
    assert "did you mean --rounds?" in capsys.readouterr().err
    assert main(["bench", "--device", "tpu"]) == 2
    assert main(["bench", "--networks", "resnet5", "--device", "cpu", "--layouts", "CHWN"]) == 2
