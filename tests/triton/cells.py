"""The Triton kernels against the equation in float64. Not collected by itself: see test_interpreter.py.

Without a GPU the kernels are interpreted: TRITON_INTERPRET=1 must be set before they are imported. With one,
`benchmarks/gpu.sh` runs the same file, and then what only a GPU can show.
"""

import os
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from cbam.ops import library, triton_gradients, triton_kernels, triton_map
from cbam.ops.triton_gradients import tail_backward
from cbam.ops.triton_kernels import tail, tail_inference
from cbam.ops.triton_map import Kernels, Map
from cbam.ops.triton_plan import PARTS, plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
large = pytest.mark.large
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about NaN and infinity
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
REPEATS = 2 if INTERPRETED else 250

# Error of a value that is stored in the type it was computed in, against its scale; and of one rounded to 16
# bits, additionally in halves of its last place. The interpreter cuts bfloat16 off instead: up to two halves.
# A parameter's gradient on a tiny map is a sum that cancels: its scale is at least a thousandth of grad's.
EXACT = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}
HALVES = {torch.float16: 1.25, torch.bfloat16: 2.5 if INTERPRETED else 1.25}


@pytest.fixture(autouse=True)
def _fresh_plans():
    """Clear the cached kernels, whose key does not include the plans that a test changes."""
    triton_map._kernels.cache_clear()


def compare(case, found, true, scales):
    """Every name of `true` within the tolerance of its dtype in `found`."""
    for name, value in true.items():
        got = found[name].detach().cpu().double().reshape(value.shape)
        least = 1.0 if case.cell.data == "constant" else 1e-3 * case.grad.abs().max().item()
        scale = max(scales[name], least)
        tolerance = torch.full_like(value, EXACT[case.cell.dtype] * scale)
        if found[name].dtype in HALVES:
            exponent = value.abs().clamp(min=torch.finfo(found[name].dtype).tiny).log2().floor()
            tolerance += HALVES[found[name].dtype] / 2 * torch.finfo(found[name].dtype).eps * 2**exponent
        excess = ((got - value).abs() - tolerance).max().item()
        assert excess <= 0, f"{name}: {excess:.3g} above the tolerance (scale {scales[name]:.3g})"


def check(tails, **changes):
    """Forward and every gradient of a cell."""
    case = tails.draw(tails.Cell(**changes), DEVICE)
    saved = tails.run(tail, case)
    true, gradients, scales = tails.written_out(case)
    compare(case, saved, {"out": true}, scales)
    found = tails.run_backward(tail_backward, case, saved)
    if not case.cell.relu:
        gradients.pop("g", None)
        assert found["g"].numel() == 0
    compare(case, found, gradients, scales)
    assert set(gradients) == {n for n, t in found.items() if t.numel()} - (
        set() if case.cell.shortcut else {"g"}
    )
    return case, saved, found


SIZES = [
    (2, 5, 4, 3),
    (1, 1, 1, 5),
    (3, 7, 1, 1),
    (1, 3, 13, 17),
    (2, 19, 7, 9),
    (1, 2, 1, 127),
    (1, 33, 5, 5),
]
FORMS = {
    "tail": {},
    "frozen": {"norm": "running", "spatial": "running"},
    "norms without biases": {"biases": False},
    "frozen, without biases": {"norm": "running", "spatial": "running", "pools": "", "biases": False},
    "block": {"norm": "", "shortcut": False, "relu": False},
    "block, running": {"norm": "", "spatial": "running", "shortcut": False, "relu": False},
    "channels": {"spatial": ""},
    "squeeze and excitation": {"pools": "avg", "spatial": "", "norm": "", "shortcut": False, "relu": False},
    "maximum alone": {"pools": "max", "spatial": "running"},
    "pixels": {"pools": "", "norm": "", "shortcut": False},
    "pixels after a norm": {"pools": "", "norm": "running"},
    "norm alone": {"pools": "", "spatial": ""},
    "norm before the block": {"shortcut": False, "spatial": "running"},
    "nothing": {"norm": "", "pools": "", "spatial": ""},
}


@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_the_equation(tails, guarded, form, nhwc):  # T24
    check(tails, nhwc=nhwc, dtype=torch.float64, **FORMS[form])


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("tail", torch.bfloat16),
        ("tail", torch.float16),
        ("frozen", torch.float32),
        ("block", torch.float32),
        ("block", torch.bfloat16),
    ],
)
def test_every_type_agrees_with_the_equation(tails, guarded, form, dtype):  # T1
    check(tails, dtype=dtype, nhwc=form == "block", **FORMS[form])


@large
@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_cell_agrees_with_the_equation(tails, guarded, form, dtype, nhwc, shape):  # T1 T8 T10 T14
    if shape[0] * shape[2] * shape[3] == 1 and "batch" in FORMS[form].values():
        pytest.skip("one value has no variance")
    check(tails, dtype=dtype, nhwc=nhwc, shape=shape, side=5, **FORMS[form])


@pytest.mark.parametrize("shape", [(2, 9, 4, 5), (1, 1, 1, 5), pytest.param((2, 2, 1, 19), marks=large)])
def test_odd_sizes_agree_with_the_equation(tails, guarded, shape):  # T8 T10
    check(tails, shape=shape, side=7, dtype=torch.float64, nhwc=shape[1] == 9)


@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("data", ["ties", pytest.param("constant", marks=large), "zero gamma", "far mean"])
def test_ties_take_the_first_index_and_a_far_mean_is_exact(tails, guarded, data, nhwc):  # T21
    case, saved, _ = check(tails, data=data, nhwc=nhwc, dtype=torch.float64, spatial="running")
    gamma = case.p["gamma"]
    signed = (case.x * torch.sign(gamma)[:, None, None]).flatten(2)
    assert torch.equal(saved["k"].long().cpu(), signed.cpu().max(2)[1])
    assert torch.equal(saved["e"], case.x.flatten(2).gather(2, saved["k"].long()[:, :, None])[:, :, 0])


def test_a_plane_in_several_parts_keeps_the_first_extremum(tails, guarded):
    for data in ("ties", "zero gamma"):
        case = tails.draw(tails.Cell(shape=(1, 3, 13, 17), data=data, nhwc=True), DEVICE)
        assert Map.of(case.x).plan.pool.parts > 1
        saved = tails.run(tail, case)
        signed = (case.x * torch.sign(case.p["gamma"])[:, None, None]).flatten(2)
        assert torch.equal(saved["k"].long().cpu(), signed.cpu().max(2)[1])
        assert torch.allclose(saved["m"], case.x.mean((2, 3)), atol=1e-6)


def test_channels_in_several_parts_agree_with_the_equation(tails, guarded):
    case, _, _ = check(tails, shape=(1, 67, 3, 3), dtype=torch.float64)
    assert 1 < Map.of(case.x).plan.squeeze.parts <= PARTS["squeeze"]


def test_a_wide_hidden_layer_takes_two_kernels(tails, guarded):
    check(tails, hidden=9, dtype=torch.float64, nhwc=True)
    check(tails, hidden=9, dtype=torch.float64, norm="", pools="max")


@large
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [
        ((5, 70, 9, 9), 5),
        ((33, 16, 5, 5), 2),
        ((3, 520, 7, 7), 65),
        ((1, 300, 14, 14), 20),
        ((2, 6, 40, 40), 1),
    ],
)
def test_the_tiles_of_a_large_gpu_agree_with_the_equation(tails, guarded, monkeypatch, shape, hidden):
    """The interpreter's own plan is of small tiles; these are those of 132 multiprocessors."""
    monkeypatch.setattr(triton_map, "processors", lambda device: 132)
    for nhwc in (False, True):
        check(tails, shape=shape, hidden=hidden, nhwc=nhwc, side=7)
    check(tails, shape=shape, hidden=hidden, dtype=torch.float64, spatial="running", norm="running")


def test_parameters_may_be_of_another_type_than_the_map(tails, guarded):  # T1 T29
    check(tails, dtype=torch.float16, parameters=torch.float32)
    check(tails, dtype=torch.float32, parameters=torch.float64, norm="running")


def test_a_large_map_in_evaluation_has_a_separate_convolution(tails, guarded, monkeypatch):
    monkeypatch.setattr(triton_map, "plan", lambda *size: replace(plan(*size), fold=False))
    for save in (True, False):
        case = tails.draw(tails.Cell(**FORMS["frozen"]), DEVICE)
        found = tails.run(tail, case, save=save)
        compare(case, found, {"out": tails.written_out(case)[0]}, {"out": 1.0})
    check(tails, dtype=torch.float64, **FORMS["frozen"])


INFERENCES = {
    form: FORMS["frozen"] | parts
    for form, parts in {"frozen": {}, "channels": {"spatial": ""}, "no ReLU": {"relu": False}}.items()
}


@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("frozen", torch.float64),
        ("frozen", torch.bfloat16),
        *(pytest.param(f, t, marks=large) for f, t in product(INFERENCES, EXACT) if f != "frozen"),
    ],
    ids=str,
)
def test_inference_with_a_norm_of_the_shortcut_is_right(tails, guarded, form, dtype, nhwc):  # T1 T24
    case = tails.draw(tails.Cell(shape=(2, 19, 7, 9), dtype=dtype, nhwc=nhwc, **INFERENCES[form]), DEVICE)
    drawn = torch.Generator().manual_seed(7)
    for biased in (True, False):
        norm = [
            torch.rand(19, generator=drawn, dtype=torch.float64).to(dtype).to(DEVICE) + 0.5 for _ in range(4)
        ]
        norm[1] = norm[1] if biased else None
        found = tails.run_inference(tail_inference, case, norm)
        weight, bias, mean, var = (None if t is None else t.cpu().double() for t in norm)
        shortcut = F.batch_norm(case.shortcut.cpu().double(), mean, var, weight, bias, eps=1e-3)
        true = tails.written_out(replace(case, shortcut=shortcut))[0]
        compare(case, {"out": found}, {"out": true}, {"out": true.abs().max().item()})
    plain = tails.run_inference(tail_inference, case, [None] * 4)
    assert torch.equal(plain, tails.run(tail, case, save=False)["out"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momenta", [(0.1, 0.01), (1 / 3, 1.0), (0.1,)], ids=str)
def test_running_statistics_are_updated_as_in_torch(momenta, dtype):
    torch.manual_seed(0)
    running, new, true = [], [], []
    for momentum, C in zip(momenta, (300, 1), strict=False):
        x, norm = (
            3 + 2 * torch.randn(4, C, 3, 5, dtype=torch.float64),
            torch.nn.BatchNorm2d(C, momentum=momentum),
        )
        norm.double()(x)
        start = torch.zeros(C, dtype=dtype), torch.ones(C, dtype=dtype)
        running += [t.to(DEVICE) for t in start]
        batch = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        new += [
            t.to(DEVICE, torch.float32 if dtype != torch.float64 and C > 1 else torch.float64) for t in batch
        ]
        true += [norm.running_mean, norm.running_var]
    track = triton_kernels.track if INTERPRETED else library.track_op
    track(running, new, list(momenta), 60)
    tolerance = {
        torch.float64: 1e-13,
        torch.float32: 1e-6,
        torch.bfloat16: 2**-8 if not INTERPRETED else 2**-7,
    }
    for found, value in zip(running, true, strict=True):
        torch.testing.assert_close(found.cpu().double(), value, rtol=tolerance[dtype], atol=tolerance[dtype])


def test_many_partial_sums_are_reduced_first(tails, guarded, monkeypatch):
    monkeypatch.setattr(triton_gradients, "MANY", 1)
    check(tails, dtype=torch.float64)


def test_offsets_of_64_bits_inside_a_tile_are_right(tails, guarded, monkeypatch):  # T22
    launch = Kernels.launch

    def wide(*arguments, **constants):
        launch(*arguments, **constants | ({"WIDE": True} if "WIDE" in constants else {}))

    monkeypatch.setattr(Kernels, "launch", wide)
    for nhwc in (False, True):
        check(tails, dtype=torch.float64, nhwc=nhwc)


def test_the_gains_scale_the_gates(tails, guarded):
    check(tails, dtype=torch.float64, gains=(2.0, 2.0))


def test_the_identity_start_is_exact_without_a_norm(tails):
    for nhwc, dtype in product((False, True), (torch.float32, torch.float16)):
        cell = tails.Cell(norm="", shortcut=False, relu=False, gains=(2.0, 2.0), nhwc=nhwc, dtype=dtype)
        case = tails.draw(cell, DEVICE)
        for name in ("w2", "b2", "s_gamma", "s_beta"):
            case.p[name].zero_()
        assert torch.equal(tails.run(tail, case)["out"], case.x)


@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
def test_unaligned_storage_agrees_with_the_equation(tails, guarded, nhwc):  # T16
    check(tails, dtype=torch.float16, offset=1, nhwc=nhwc, shape=(2, 8, 4, 4))


def test_only_requested_gradients_are_computed(tails, guarded):  # T24
    case = tails.draw(tails.Cell(), DEVICE)
    saved = tails.run(tail, case)
    every = tails.run_backward(tail_backward, case, saved)
    for need_x, need_shortcut in ((False, False), (False, True), (True, False)):
        some = tails.run_backward(tail_backward, case, saved, need_x=need_x, need_shortcut=need_shortcut)
        assert (some["dx"].numel() > 0) == need_x
        assert (some["g"].numel() > 0) == need_shortcut
        for name, value in some.items():
            if value.numel():
                assert torch.equal(value, every[name]), (name, need_x, need_shortcut)


@pytest.mark.parametrize("form", ["tail", "frozen", pytest.param("block, running", marks=large)])
def test_a_forward_that_saves_nothing_is_bit_equal(tails, form):  # T25
    case = tails.draw(tails.Cell(shape=(2, 9, 4, 5), **FORMS[form]), DEVICE)
    kept, lean = tails.run(tail, case), tails.run(tail, case, save=False)
    assert torch.equal(kept["out"], lean["out"])
    for name in ("m", "e", "k", "gate", "s"):
        assert lean[name].shape == (0,)
        assert lean[name].dtype == kept[name].dtype
    assert (lean["mu"].numel() > 0) == (lean["s_mu"].numel() > 0) == (form == "tail")


@pytest.mark.parametrize("form", ["tail", pytest.param("block", marks=large)])
def test_repeated_runs_are_bit_equal(tails, form):  # T30
    case = tails.draw(tails.Cell(shape=(2, 9, 4, 4), nhwc=form == "tail", **FORMS[form]), DEVICE)
    grad, x = case.grad.clone(), case.x.clone()
    runs = []
    for _ in range(REPEATS):
        saved = tails.run(tail, case)
        runs.append({**saved, **tails.run_backward(tail_backward, case, saved)})
        assert all(torch.equal(value, runs[0][name]) for name, value in runs[-1].items())
        runs = runs[:1]
    assert torch.equal(case.grad, grad)
    assert torch.equal(case.x, x)


@pytest.mark.parametrize(
    ("form", "data"),
    [
        pytest.param(form, data, marks=() if data in few else large)
        for form, few in {
            "frozen": {"nan", "-inf"},
            "block, running": {"inf"},
            "maximum alone": {"nan", "inf"},
            "pixels after a norm": {"-inf"},
        }.items()
        for data in ("nan", "inf", "-inf")
    ],
)
def test_nan_and_inf_appear_where_the_equation_has_them(tails, form, data):  # T17 T18
    changes = {**FORMS[form], "spatial": "running", "norm": FORMS[form].get("norm", "running")}
    for nhwc in (False, True):
        case = tails.draw(tails.Cell(shape=(2, 5, 6, 5), data=data, nhwc=nhwc, **changes), DEVICE)
        saved = tails.run(tail, case)
        found = tails.run_backward(tail_backward, case, saved)
        out, dx = saved["out"].cpu(), found["dx"].cpu()
        true, gradients, _ = tails.written_out(case)
        assert torch.equal(out.isnan(), true.isnan())
        assert torch.equal(out.isinf(), true.isinf())
        assert torch.equal(dx.isnan(), gradients["dx"].isnan())
        assert out[1].isfinite().all()  # the other sample is unaffected
        assert dx[1].isfinite().all()


def test_a_nan_in_training_reaches_the_whole_batch(tails):  # T17
    case = tails.draw(tails.Cell(data="nan"), DEVICE)
    out = tails.run(tail, case)["out"].cpu()
    assert torch.equal(out.isnan(), tails.written_out(case)[0].isnan())


def test_a_mean_in_float16_does_not_overflow(tails):  # T20
    case = tails.draw(tails.Cell(dtype=torch.float16, norm="", shape=(1, 1, 9, 9)), DEVICE)
    case.x.fill_(60000)
    assert tails.run(tail, case)["m"].item() == 60000


@pytest.mark.parametrize("form", ["tail", *(pytest.param(f, marks=large) for f in FORMS if f != "tail")])
def test_fake_kernels_return_the_real_shapes(tails, form):  # T33
    from cbam.ops import library

    def shapes(function):
        case = tails.draw(tails.Cell(**FORMS[form]), DEVICE)
        kept, lean = tails.run(function[0], case), tails.run(function[0], case, save=False)
        found = [kept, lean]
        for need_x, need_shortcut in product((True, False), (True, False)):
            needs = {"need_x": need_x, "need_shortcut": need_shortcut and case.cell.relu}
            found.append(tails.run_backward(function[1], case, kept, **needs))
        return [{n: (t.shape, t.dtype, t.stride()) for n, t in result.items()} for result in found]

    assert shapes((tail, tail_backward)) == shapes((library._fake_forward, library._fake_backward))


@gpu
def test_another_stream_gives_the_same_bits(tails):  # T31
    case = tails.draw(tails.Cell(shape=(4, 64, 28, 28), nhwc=True), DEVICE)
    here = tails.run(tail, case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = tails.run(tail, case)
        found = tails.run_backward(tail_backward, case, there)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(value, there[name]) for name, value in here.items())
    again = tails.run_backward(tail_backward, case, here)
    assert all(torch.equal(value, found[name]) for name, value in again.items())


@gpu
def test_a_cuda_graph_replays_with_new_inputs(tails):
    case = tails.draw(tails.Cell(shape=(4, 64, 28, 28), nhwc=True, dtype=torch.bfloat16), DEVICE)
    tails.run_backward(tail_backward, case, tails.run(tail, case))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        saved = tails.run(tail, case)
        found = tails.run_backward(tail_backward, case, saved)
    other = tails.draw(tails.Cell(shape=(4, 64, 28, 28), nhwc=True, dtype=torch.bfloat16, seed=1), DEVICE)
    for old, new in ((case.x, other.x), (case.shortcut, other.shortcut), (case.grad, other.grad)):
        old.copy_(new)
    graph.replay()
    eager = tails.run(tail, case)
    again = tails.run_backward(tail_backward, case, eager)
    assert all(torch.equal(value, saved[name]) for name, value in eager.items())
    assert all(torch.equal(value, found[name]) for name, value in again.items())


@gpu
@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
def test_offsets_beyond_2_to_the_31_are_right(tails, nhwc):  # T22
    layout = torch.channels_last if nhwc else torch.contiguous_format
    cell = tails.Cell(shape=(1, 64, 8, 8), norm="", spatial="running", shortcut=False, nhwc=nhwc)
    case = tails.draw(cell, DEVICE)
    case.x = torch.empty(33, 64, 1024, 1024, dtype=torch.float16, device=DEVICE).to(memory_format=layout)
    case.x.normal_()
    out = tails.run(tail, case, save=False)["out"]
    last = case.x[-1:].clone(memory_format=torch.preserve_format)
    del case.x
    case.x = last
    alone = tails.run(tail, case, save=False)["out"]
    assert torch.allclose(out[-1:], alone, atol=1e-2, rtol=1e-2)
    assert out[-1].isfinite().all()


@gpu
def test_more_planes_than_grid_rows_are_right(tails):  # T23
    check(tails, shape=(700, 101, 2, 2), dtype=torch.float32)


@gpu
@pytest.mark.parametrize("shape", [(8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7)])
@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
def test_the_stages_of_a_resnet_agree_with_the_equation(tails, shape, nhwc):
    check(tails, shape=shape, nhwc=nhwc, dtype=torch.bfloat16, hidden=shape[1] // 16, side=7, data="decided")
