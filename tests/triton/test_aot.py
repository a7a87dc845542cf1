"""benchmarks/aot.py finds the faults it looks for; `make check` runs it on the kernels."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import aot

ROOT = Path(__file__).parents[2]
TRAINING = aot.FORMS[0]


def launch(kernel: str, **changes) -> aot.Launch:
    found = aot.launches(aot.SHAPES[0], torch.bfloat16, True, TRAINING)
    return replace(next(one for one in found if one.kernel == kernel), **changes)


def result(kernel: str, **resources: int) -> aot.Result:
    return aot.Result(launch(kernel), 90, **resources)


def test_a_training_step_is_seven_launches_forward_and_six_backward():
    found = [one.kernel for one in aot.launches((8, 256, 14, 14), torch.bfloat16, True, TRAINING)]
    forward = found[: found.index("refine") + 1]
    assert forward == ["pool", "statistics", "gate", "squeeze", "convolve", "refine"]
    backward = ["reduce_gradient", "spatial_gradient", "weigh", "hidden_gradient", "parameter_gradients"]
    assert found[len(forward) :] == ["track", *backward, "write"]


def test_inference_is_four_launches():
    found = aot.launches((1, 256, 14, 14), torch.bfloat16, True, aot.FORMS[1])
    assert [one.kernel for one in found] == ["pool", "gate", "squeeze", "refine"]


def test_the_bare_block_reads_its_gradient_once_in_pass_3_and_never_its_output():
    found = aot.launches(aot.SHAPES[0], torch.bfloat16, True, aot.FORMS[3])
    absent = {one.kernel: {name for name, value in one.constants if value is None} for one in found}
    assert {"OUTPUT", "G"} <= absent["reduce_gradient"]
    assert "SLOPE" in absent["write"]  # without it x is not read


def test_with_frozen_statistics_pass_3_does_not_read_the_map():
    found = aot.launches(aot.SHAPES[0], torch.bfloat16, True, aot.FORMS[2])
    write = next(one for one in found if one.kernel == "write")
    assert ("SLOPE", None) in write.constants


def test_an_unaligned_map_is_not_compiled_as_aligned():
    aligned, unaligned = (
        next(
            one
            for one in aot.launches(aot.SHAPES[0], torch.bfloat16, True, TRAINING, offset)
            if one.kernel == "squeeze"
        )
        for offset in (0, 1)
    )
    assert "X" in aligned.divisible
    assert "X" not in unaligned.divisible


@pytest.mark.parametrize("full", [128, 8])
def test_a_smaller_last_batch_is_not_recompiled(full):
    for C, side in ((256, 56), (512, 28), (2048, 7)):
        known = set(aot.launches((full, C, side, side), torch.bfloat16, True, TRAINING))
        for N in range(full // 2 + 1, full):
            assert known >= set(aot.launches((N, C, side, side), torch.bfloat16, True, TRAINING)), N


@pytest.mark.parametrize(
    ("kernel", "ptx", "resources", "fault"),
    [
        ("refine", "max.f32 %f1, %f2, %f3;", {}, "drops NaN"),
        ("write", "min.f64 %f1, %f2, %f3;", {}, "drops NaN"),
        ("gate", "mma.sync.tf32", {}, "TF32"),
        ("gate", "", {"local": 8}, "spills"),
        ("gate", "", {"stack": 64}, "stack"),
        ("gate", "", {"shared": 50_000}, "shared"),
        ("gate", "", {"registers": 200}, "registers"),
    ],
)
def test_a_fault_is_reported(kernel, ptx, resources, fault):
    (found,) = aot.faults(result(kernel, **resources), ptx)
    assert fault in found


@pytest.mark.parametrize(
    ("kernel", "ptx"),
    [("refine", "max.NaN.f32 %f1, %f2, %f3; max.s32 %r1, %r2, %r3;"), ("squeeze", "max.f32 %f1, %f2, %f3;")],
)
def test_harmless_code_is_not_reported(kernel, ptx):
    assert not list(aot.faults(result(kernel, registers=128, stack=8), ptx))


def test_a_kernel_that_does_not_compile_is_reported():
    broken = launch("gate", signature=(("MEAN", "*nonsense"),))
    assert aot.compiled(broken, 90).faults


@pytest.mark.large
def test_every_kernel_compiles_for_every_architecture():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--all"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
