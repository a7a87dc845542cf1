"""Outputs and every gradient against the formula in float64, within the policy for fused kernels.

The reference gets the same numbers as the kernels, already rounded to their type. `eager` is the formula in
that type, `floor` what one rounding of the exact result costs, S the largest value. (T1, T8, T10, T21, T24)
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

RELATIVE = {torch.bfloat16: 3e-3, torch.float16: 5e-4}  # of the weights' gradients in the L2 norm
ROOM = 1e-6  # of S, for where the rounding of an exact result happens to cost nothing


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


def check_map(name: str, got: Tensor, exact: Tensor, eager: Tensor, slack: float) -> None:
    """Of a feature map: the output, or a gradient with respect to one."""
    S, found, eagers = exact.abs().max().item(), error(got, exact), error(eager, exact)
    if got.dtype == torch.float64:
        limit = 1e-7 * S + 1e-12
    elif got.dtype == torch.float32:
        # With few pixels or one sample there are few sums: the error of one order of summation is luck.
        luck = 2 if got.numel() // got.shape[1] < 500 or len(got) == 1 else 1
        limit = min(luck * (2 * eagers + slack * S), 1e-5 * max(S, 1))
    else:
        floor = error(exact.to(got.dtype), exact)
        limit = 1.25 * floor + ROOM * S
    assert found <= limit, f"{name}: error {found:.3g}, eager {eagers:.3g}, allowed {limit:.3g}"


def check_weight(
    name: str, got: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype, samples: int
) -> None:
    """Of a parameter's gradient, by its L2 norm. With few numbers, eager may be exact by luck.

    A matrix of one sample is an outer product: as many numbers as its sides have.
    """
    S = exact.norm().item() + 1e-6
    found, eagers = (got.double() - exact).norm().item() / S, (eager.double() - exact).norm().item() / S
    few = exact.numel() < 100 or samples == 1
    limit = max(2 * eagers, 2e-5) if few else min(2 * eagers + 1e-6, 2e-5)
    limit = 1e-7 if dtype == torch.float64 else limit
    limit = RELATIVE.get(dtype, limit)
    assert found <= limit, f"{name}: error {found:.3g}, eager {eagers:.3g}, allowed {limit:.3g}"


def test_the_tail_and_its_gradients_equal_the_formula(kernels, cell):  # T1 T8 T10 T21
    case, level = cell
    kernels.level(min(level, kernels.best))
    inputs = kernels.draw(case)
    got = kernels(case, inputs)
    exact = kernels.formula(case, inputs, torch.float64)
    eager = kernels.formula(case, inputs, case.dtype)
    check_map("out", got.out, exact.out, eager.out, 1e-7)
    assert got.out.stride() == inputs.x.stride()
    if "batch" not in (case.norm, case.spatial):
        assert kernels.inference(case, inputs).equal(got.out)
        assert kernels.in_place(case, inputs).equal(got.out)
    assert got.grads.keys() == exact.grads.keys()
    for name, value in got.grads.items():
        if name in ("x", "shortcut"):
            check_map(name, value, exact.grads[name], eager.grads[name], 2e-7)
            assert value.stride() == inputs.x.stride()
        elif name in exact.terms:  # a single sum that cancels: against the sum of its terms
            assert error(value, exact.grads[name]) <= 1e-6 * exact.terms[name], name
        else:
            check_weight(name, value, exact.grads[name], eager.grads[name], case.dtype, case.shape[0])


def test_without_gradients_the_output_is_bit_equal_and_nothing_is_saved(kernels, level):  # T25
    for layout in kernels.layouts:
        case = kernels.Case((3, 24, 11, 13), layout=layout)
        inputs = kernels.draw(case)
        kept = kernels.forward(case, inputs, True)
        out, m, e, k, mu, v, gate, s, s_mu, s_v = kernels.forward(case, inputs, False)
        assert torch.equal(out, kept[0])
        assert [t.shape for t in (m, e, k, gate, s)] == [(0,)] * 5
        for ours, theirs in zip((mu, v, s_mu, s_v), (kept[4], kept[5], *kept[8:]), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 256, 14, 14), (4, 64, 28, 28), (1, 17, 13, 17), (3, 40, 7, 7), (2, 3, 1, 1)]
)
def test_the_output_written_over_the_input_is_bit_equal(kernels, level, shape, dtype):  # T25
    for layout in kernels.layouts:
        case = kernels.Case(shape, dtype, layout, norm="running", spatial="running")
        inputs = kernels.draw(case)
        assert kernels.in_place(case, inputs).equal(kernels.forward(case, inputs, False)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("spatial", ["running", ""])
@pytest.mark.parametrize(
    "shape", [(2, 2048, 7, 7), (4, 64, 28, 28), (1, 17, 13, 17), (3, 40, 7, 7), (2, 3, 1, 1)]
)
def test_inference_with_a_norm_of_the_shortcut_is_right(
    kernels, level, shape, spatial, relu, dtype
):  # T1 T8 T25
    for layout, biased in (("NCHW", True), ("NHWC", True), ("NHWC", False)):
        case = kernels.Case(shape, dtype, layout, norm="running", spatial=spatial, relu=relu)
        inputs, r = kernels.draw(case), torch.Generator().manual_seed(3)
        norm = [torch.randn(shape[1], generator=r), torch.randn(shape[1], generator=r) if biased else None]
        norm += [torch.randn(shape[1], generator=r), torch.rand(shape[1], generator=r) + 0.5]
        norm = [None if t is None else t.to(dtype) for t in norm]
        got = kernels.inference(case, inputs, norm)
        assert kernels.in_place(case, inputs, norm=norm).equal(got)
        assert got.stride() == inputs.x.stride()
        found = []
        for kind in (torch.float64, dtype):
            weight, bias, mean, var = (None if t is None else t.to(kind) for t in norm)
            shortcut = F.batch_norm(inputs.shortcut.to(kind), mean, var, weight, bias, eps=1e-5)
            found.append(kernels.formula(case, replace(inputs, shortcut=shortcut), kind).out)
        check_map("out", got, *found, 1e-7)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("data", ["normal", "ties", "constant"])
def test_saved_statistics_describe_the_planes(kernels, level, layout, data):  # T21
    case = kernels.Case((3, 37, 9, 11), layout=layout, data=data, gammas="zero")
    inputs = kernels.draw(case)
    _, m, e, k, mu, v, *_ = kernels.forward(case, inputs, True)
    planes = inputs.x.flatten(2)
    gamma = inputs.values["gamma"]
    torch.testing.assert_close(m, planes.mean(2))
    lowest = planes.argmin(2)
    first = torch.where(gamma > 0, planes.argmax(2), torch.where(gamma < 0, lowest, torch.zeros_like(lowest)))
    assert k.dtype == torch.int32
    assert torch.equal(k.long(), first)
    assert torch.equal(e, planes.gather(2, first[:, :, None])[:, :, 0])
    var, mean = torch.var_mean(inputs.x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mu.double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(v.double(), var, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("distance", [1, 100, 1000])
def test_the_variance_is_right_if_the_mean_is_far_from_zero(kernels, level, layout, distance):
    case = kernels.Case((4, 16, 40, 40), layout=layout)
    inputs = kernels.draw(case)
    inputs.x += distance
    v = kernels.forward(case, inputs, True)[5]
    var = inputs.x.double().var((0, 2, 3), correction=0)
    assert ((v - var) / var).abs().max() < 3e-6  # a sum of squares would be off by 0.3 at 1000


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_variance_is_right_if_the_first_pixel_is_an_outlier(kernels, level, layout):
    case = kernels.Case((2, 16, 40, 40), layout=layout)
    inputs = kernels.draw(case)
    inputs.x[:, :, 0, :3] += 1e4
    v = kernels.forward(case, inputs, True)[5]
    var = inputs.x.double().var((0, 2, 3), correction=0)
    assert ((v - var) / var).abs().max() < 1e-4


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("need_shortcut", [True, False])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_only_requested_gradients_are_computed(kernels, level, layout, need_x, need_shortcut):  # T24
    case = kernels.Case(layout=layout)
    inputs = kernels.draw(case)
    saved = kernels.forward(case, inputs, True)
    whole = kernels.backward(case, inputs, saved)
    part = kernels.backward(case, inputs, saved, need_x, need_shortcut)
    for place, (ours, all_of_it) in enumerate(zip(part, whole, strict=True)):
        if (place == 0 and not need_x) or (place == 1 and not need_shortcut):
            assert ours.shape == (0,)
        else:
            assert torch.equal(ours, all_of_it)


def test_a_sum_over_a_large_half_precision_map_does_not_overflow(kernels, level):  # T20
    case = kernels.Case((1, 2, 300, 300), torch.float16, norm="", spatial="")
    inputs = kernels.draw(case)
    inputs.x.fill_(60000)
    assert kernels.forward(case, inputs, True)[1].tolist() == [[60000, 60000]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_types_are_rounded_as_in_torch(kernels, level, dtype):  # T19
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    every = bits.view(dtype).reshape(1, 16, 64, 64)
    for seed in range(3):
        other = every.flatten()[torch.randperm(2**16, generator=torch.Generator().manual_seed(seed))]
        for layout in kernels.layouts.values():
            x, y = (
                every.contiguous(memory_format=layout),
                other.view_as(every).contiguous(memory_format=layout),
            )
            case = kernels.Case(x.shape, dtype, norm="", pools=(), spatial="", relu=False)
            inputs = kernels.draw(case)
            inputs.x, inputs.shortcut = x, y
            out = kernels.forward(case, inputs, False)[0]
            expected = (x.float() + y.float()).to(dtype)
            nan = expected.isnan()
            assert torch.equal(out.isnan(), nan)
            assert torch.equal(out[~nan].view(torch.int16), expected[~nan].view(torch.int16))


def test_inference_refuses_unbatched_and_empty_maps(kernels):  # T5
    case = kernels.Case(norm="running", spatial="running")
    inputs = kernels.draw(case)
    for bad in (inputs.x[0], inputs.x[:0]):
        inputs.x = bad
        for run in (kernels.in_place, kernels.inference):
            with pytest.raises(RuntimeError, match="expected a map"):
                run(case, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momenta", [(0.1, 0.01), (1 / 3, 1.0), (0.1,)], ids=str)
def test_running_statistics_are_updated_as_in_torch(kernels, momenta, dtype):
    torch.manual_seed(0)
    maps = torch.randn(3, 21, 5, 4, dtype=torch.float64) + 3, torch.randn(3, 1, 5, 4, dtype=torch.float64)
    running, new, expected = [], [], []
    for x, momentum in zip(maps, momenta, strict=False):
        norm = torch.nn.BatchNorm2d(x.shape[1], momentum=momentum).double()
        torch.nn.init.normal_(norm.running_mean)
        for value in (norm.running_mean, norm.running_var):
            apart = torch.zeros(2 * len(value), dtype=dtype)[::2]
            running.append(apart.copy_(value))
            value.copy_(apart)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        new += [mean.float(), var]
        norm(x)
        expected += [norm.running_mean, norm.running_var]
    torch.ops.cbam.track_(running, new, list(momenta), 60)
    for ours, theirs in zip(running, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs.to(dtype), rtol=1e-6 if dtype.itemsize > 2 else 1e-2, atol=1e-6
        )
