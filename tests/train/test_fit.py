import copy
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

import cbam
from cbam.data import Images, loader
from cbam.errors import ConfigError, DataError, InputError, NonFiniteError, OutOfMemoryError
from cbam.train import Recipe, evaluate, fit, pick_device
from cbam.train.average import Average
from cbam.train.classification import Classification, normalise, per_image_scores
from cbam.train.engine import _DDP, _warn_of_emulation
from cbam.train.optimizer import parameter_groups
from cbam.train.steps import Steps

ROOT = Path(cbam.__file__).parents[1]
SHORT = Recipe(epochs=2, batch_size=16)
MEAN = STD = (0.5, 0.5, 0.5)


class Colours(Images):
    """Images of a single colour, which is the class; records which samples were requested."""

    def __init__(self, n: int, classes: int = 3) -> None:
        super().__init__("colours", [str(c) for c in range(classes)], [i % classes for i in range(n)], size=8)
        self.asked: list[tuple[int, int]] = []

    def sample(self, epoch, index):
        self.asked.append((epoch, index))
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        image[self.targets[index] % 3] = 40 * (1 + self.targets[index])
        return image, (float("nan"),) * 4


class DiesInWorker(Colours):
    def sample(self, epoch, index):
        os._exit(3)


def small(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, classes),
    )  # fmt: skip


def bits(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(digits, network):
    one, two, other = (copy.deepcopy(network) for _ in range(3))
    histories = [
        fit(model, *digits, SHORT, seed=s, device="cpu") for model, s in ((one, 3), (two, 3), (other, 4))
    ]
    assert same(bits(one), bits(two))
    assert not same(bits(one), bits(other))
    assert [e["val_loss"] for e in histories[0]] == [e["val_loss"] for e in histories[1]]


def test_two_arms_see_the_same_images_in_the_same_order():
    asked = []
    for model in (small(), nn.Sequential(*small(), nn.Identity())):
        train = Colours(12)
        fit(model, train, Colours(6), SHORT, seed=1, device="cpu", first_epoch=5)
        asked.append(train.asked)
    assert asked[0] == asked[1]
    assert [epoch for epoch, _ in asked[0]] == [5] * 12 + [6] * 12
    assert sorted(index for _, index in asked[0][:12]) == list(range(12))
    assert asked[0][:12] != [(5, index) for _, index in asked[0][12:]]


def test_a_fit_learns_and_returns_an_entry_per_epoch():
    recipe = Recipe(epochs=4, batch_size=8, lr=0.1)
    work = []
    history = fit(small(), Colours(48), Colours(9), recipe, seed=0, device="cpu", on_step=work.append)
    assert [entry["epoch"] for entry in history] == [0, 1, 2, 3]
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert history[0]["lr"] == recipe.lr
    assert history[2]["lr"] == pytest.approx(recipe.lr / 2)
    assert all(0 < entry["step_seconds"] < entry["seconds"] for entry in history)
    assert all(entry["val_top5"] is None for entry in history)
    assert sum(work) == 4 * (3 * 48 + 9)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_error_and_loss_of_an_epoch_are_the_mean_over_all_images(accumulate):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([2.0, 1.0, 0.0]))  # predicts class 0 for every image
    recipe = Recipe(epochs=1, batch_size=8, lr=0.0, accumulate=accumulate)
    (entry,) = fit(model, Colours(22), Colours(22), recipe, seed=0, device="cpu")
    assert entry["train_top1"] == entry["val_top1"] == pytest.approx(100 * 14 / 22)
    assert entry["train_loss"] == pytest.approx(entry["val_loss"], rel=1e-6)


def test_adamw_and_the_step_schedule_train_too():
    recipe = Recipe(epochs=3, batch_size=8, optimizer="adamw", lr=0.02, schedule="step", step_epochs=2)
    history = fit(small(), Colours(24), Colours(9), recipe, seed=0, device="cpu")
    assert [entry["lr"] for entry in history] == pytest.approx([0.02, 0.02, 0.002])
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_an_evaluation_counts_every_image_once_and_agrees_with_a_plain_loop(digits, network):
    # D33
    _, val = digits
    scored = evaluate(network, val, batch_size=7, device="cpu")
    network.eval()
    with torch.no_grad():
        image = torch.stack([val[i]["image"] for i in range(len(val))])
        logits = network(normalise(image, val.mean, val.std)).double()
    targets = torch.tensor(val.targets)
    best = logits.topk(5, 1).indices
    assert scored.targets.tolist() == val.targets
    assert torch.allclose(scored.probabilities, logits.softmax(1), atol=1e-6)
    assert scored.top1 == pytest.approx(100 * (best[:, 0] != targets).double().mean().item())
    assert scored.top5 == pytest.approx(100 * (best != targets[:, None]).all(1).double().mean().item())
    assert scored.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)


def test_evaluate_agrees_with_the_last_epoch_of_a_fit(digits, network):
    history = fit(network, *digits, SHORT, seed=0, device="cpu")
    scored = evaluate(network, digits[1], device="cpu")
    assert history[-1]["val_top1"] == scored.top1
    assert history[-1]["val_loss"] == pytest.approx(scored.loss, rel=1e-5)


def test_a_fit_leaves_rng_handlers_log_levels_and_files_unchanged(
    digits, network, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    network.eval()
    frozen = network.conv1.weight.requires_grad_(False).clone()
    log, handler = logging.getLogger("pytorch_lightning").level, signal.getsignal(signal.SIGINT)
    before = torch.random.get_rng_state()
    fit(network, *digits, Recipe(epochs=1, batch_size=16), seed=0, device="cpu")
    evaluate(network, digits[1], device="cpu")
    assert not network.training
    assert torch.equal(network.conv1.weight, frozen)
    assert network.layer1[0].conv1.weight.is_contiguous()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert logging.getLogger("pytorch_lightning").level == log
    assert signal.getsignal(signal.SIGINT) is handler
    assert list(Path(tmp_path).iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_loss_that_is_not_finite_stops_before_the_step():
    # R10
    model = small()
    with torch.no_grad():
        model[5].bias[0] = float("nan")
    before = bits(model)
    with pytest.raises(NonFiniteError, match="the loss is nan in epoch 0, step 0") as caught:
        fit(model, Colours(12), Colours(6), SHORT, seed=0, device="cpu")
    assert caught.value.exit_code == 5
    assert isinstance(caught.value, ArithmeticError)
    assert torch.equal(model[0].weight, before["0.weight"])


class BadWhenScored(nn.Module):
    """A network whose outputs are NaN for some images, only in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small()

    def forward(self, x):
        out = self.network(x)
        if not self.training:
            out[1::2, 0] = float("nan")
        return out


@pytest.mark.parametrize("classes", [5, 6, 400])
def test_validation_keeps_a_few_numbers_per_image_and_evaluate_the_logits(classes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
    batch = {
        "image": torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8),
        "target": torch.arange(9) % classes,
        "index": torch.arange(9),
    }
    kept = []
    for recipe in (Recipe(), None):
        task = Classification(network, MEAN, STD, recipe)
        with torch.no_grad():
            kept.append(task.collected([task.output(batch)]))
    assert sum(part.numel() for part in kept[0]) == 9 * (3 if classes == 5 else 4)
    logits = kept[1][-1]
    assert logits.shape == (9, classes)
    first = logits.topk(min(5, classes), dim=1).indices == batch["target"][:, None]
    for scores in (task.scores(part) for part in kept):
        expected = nn.functional.cross_entropy(logits.double(), batch["target"]).item()
        assert scores["val_loss"] == pytest.approx(expected, rel=1e-14)
        assert scores["val_top1"] == 100 * ((9 - first[:, 0].sum().item()) / 9)
        assert scores["val_top5"] == (None if classes == 5 else 100 * ((9 - first.sum().item()) / 9))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 1])
def test_one_nonfinite_logit_is_detected_in_any_class(value, column):
    logits = torch.zeros(3, 7)
    logits[1, column] = value
    assert per_image_scores(logits, torch.zeros(3, dtype=torch.long))[:, 0].isnan().tolist() == [
        False,
        True,
        False,
    ]


def test_nan_outputs_raise_instead_of_being_scored():
    # R10
    told = r"NaN or infinity for 3 of 6 validation images \(1, 3, 5\)"
    with pytest.raises(NonFiniteError, match=told):
        evaluate(BadWhenScored(), Colours(6), device="cpu")
    with pytest.raises(NonFiniteError, match=told):
        fit(BadWhenScored(), Colours(12), Colours(6), SHORT, seed=0, device="cpu")


def test_images_are_normalised_alike_in_evaluation_and_in_training_after_it():
    pictures = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    with torch.inference_mode():
        first = normalise(pictures, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    second = normalise(pictures, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    (second * torch.ones(1, requires_grad=True)).sum().backward()
    mean, std = torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1), torch.tensor((0.5, 0.25, 0.125)).view(3, 1, 1)
    torch.testing.assert_close(second, (pictures / 255 - mean) / std)
    assert torch.equal(first, second)
    assert second.is_contiguous(memory_format=torch.channels_last)


def test_a_keyboard_interrupt_is_raised_and_the_sigint_handler_restored():
    # R18
    def stop(_):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(small(), Colours(12), Colours(6), SHORT, seed=0, device="cpu", on_step=stop)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_failed_fit_restores_training_modes_and_memory_format():
    def stop(_):
        raise RuntimeError("stop")

    model = small().eval()
    model[1].train()
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, Colours(12), Colours(6), SHORT, seed=0, device="cpu", on_step=stop)
    assert [module.training for module in model] == [False, True, False, False, False, False]
    assert model[0].weight.is_contiguous()


class MemoryHungry(nn.Module):
    """Asks for more memory than there is."""

    def __init__(self, ask) -> None:
        super().__init__()
        self.layer, self.ask = nn.Linear(192, 3), ask

    def forward(self, x):
        self.ask()
        return self.layer(x.flatten(1))


def gpu_is_full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("ask", [lambda: torch.empty(1 << 50), gpu_is_full], ids=["cpu", "gpu"])
def test_out_of_memory_in_training_suggests_more_accumulation(ask):
    # R15, R16
    recipe = Recipe(epochs=1, batch_size=8, accumulate=2)
    with pytest.raises(
        OutOfMemoryError, match="with batches of 4; --accumulate 4 computes the same steps"
    ) as caught:
        fit(MemoryHungry(ask), Colours(12), Colours(6), recipe, seed=0, device="cpu")
    assert caught.value.exit_code == 6
    assert isinstance(caught.value, MemoryError)


def test_out_of_memory_in_evaluation_suggests_a_smaller_batch():
    # R15
    with pytest.raises(OutOfMemoryError, match="on cpu; a smaller --batch-size needs less") as caught:
        evaluate(MemoryHungry(gpu_is_full), Colours(6), batch_size=3, device="cpu")
    assert "--accumulate" not in str(caught.value)


def test_batchnorm_over_one_value_per_channel_suggests_less_accumulation():
    # T7
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    recipe = Recipe(epochs=1, batch_size=4, accumulate=4)
    with pytest.raises(InputError, match="a lower --accumulate"):
        fit(model, Colours(12), Colours(6), recipe, seed=0, device="cpu")


def test_the_average_has_the_memory_format_of_the_weights():
    model = small()
    average = Average(model, 0.5)
    model.to(memory_format=torch.channels_last)
    average.update()
    assert average.tensors["0.weight"].stride() == model[0].weight.stride()
    assert torch.equal(average.tensors["0.weight"], model[0].weight)


def test_an_average_laid_out_in_inference_mode_can_be_updated_in_training():
    """A run killed during validation resumes with it, in inference mode."""
    model = small()
    average = Average(model, 0.5)
    model.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        average.swap()
        average.swap()
    average.update()
    assert not average.tensors["0.weight"].is_inference()
    assert not average.tensors["0.weight"].requires_grad


def test_training_on_cpu_does_not_seed_the_gpus(monkeypatch):
    """On a machine with 8 busy GPUs, training on the CPU does not touch them."""
    model = small()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, Colours(12), Colours(6), SHORT, seed=0, device="cpu")
        evaluate(model, Colours(6), device="cpu")


@pytest.mark.parametrize(("device", "moved"), [("cpu", True), ("cuda", False)])
def test_after_an_error_ddp_on_cuda_skips_the_blocking_teardown(monkeypatch, device, moved):
    # R6
    calls: list[str] = []
    monkeypatch.setattr(DDPStrategy, "teardown", lambda self: calls.append("teardown"))
    monkeypatch.setattr(_DDP, "root_device", torch.device(device))
    strategy = _DDP()
    strategy.on_exception(RuntimeError("Connection closed by peer"))
    strategy.teardown()
    assert calls == ["teardown"] * moved
    _DDP().teardown()
    assert calls == ["teardown"] * (moved + 1)


def test_the_average_follows_the_weights_and_is_evaluated_and_returned():
    model, plain, copies = small(), small(), []
    recipe = Recipe(epochs=1, batch_size=8, lr=0.1, ema=0.8)
    fit(plain, Colours(24), Colours(9), dataclasses.replace(recipe, ema=0.0), seed=0, device="cpu",
        on_step=lambda work: copies.append(bits(plain)))  # fmt: skip
    history = fit(model, Colours(24), Colours(9), recipe, seed=0, device="cpu")
    torch.manual_seed(0)
    expected = bits(small())
    for step, weights in enumerate(copies[:3], 1):
        decay = min(0.8, (1 + step) / (10 + step))
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                expected[name] = expected[name] + (1 - decay) * (tensor - expected[name])
    for name, tensor in bits(model).items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, expected[name], atol=1e-6), name
    assert evaluate(model, Colours(9), device="cpu").loss == pytest.approx(history[0]["val_loss"], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp64"])
def test_other_precisions_train_and_stay_close_to_fp32(precision):
    recipe = Recipe(epochs=2, batch_size=8, lr=0.1, precision=precision)
    model, single = small(), small()
    history = fit(model, Colours(24), Colours(9), recipe, seed=0, device="cpu")
    fit(single, Colours(24), Colours(9), dataclasses.replace(recipe, precision="fp32"), seed=0, device="cpu")
    assert history[1]["train_loss"] < history[0]["train_loss"]
    kind = torch.float64 if precision == "fp64" else torch.float32
    assert model[0].weight.dtype == kind
    far = (model[0].weight - single[0].weight).abs().max().item()
    assert 0 < far < (1e-5 if precision == "fp64" else 0.05)


class Amplify(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 50 * x


def test_first_steps_skipped_by_the_fp16_scaler_do_not_warn_about_the_schedule():
    model = small().insert(5, Amplify())  # scaled by 65536, the last layer's gradient overflows fp16
    before, recipe = bits(model), Recipe(epochs=4, batch_size=8, lr=1e-4, precision="fp16")
    scales, halve = [], torch.amp.GradScaler.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.amp.GradScaler, "update", lambda self: (halve(self), scales.append(self.get_scale()))
        )
        fit(model, Colours(24), Colours(9), recipe, seed=0, device="cpu")
    assert scales[0] == 2**15  # the first step was skipped
    assert not torch.equal(model[6].weight, before["6.weight"])  # and a later one was not


class InfiniteGradient(torch.autograd.Function):
    """The output is finite, its gradient is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_output * float("inf")


class OverflowInBackward(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return InfiniteGradient.apply(x)  # type: ignore[return-value]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_that_always_overflow_fp16_end_the_run_after_a_few_steps(accumulate):
    model = small().append(OverflowInBackward())
    before = bits(model)["5.weight"]
    recipe = Recipe(epochs=12, batch_size=8, accumulate=accumulate, precision="fp16")
    with pytest.raises(NonFiniteError, match=r"fell to 0.000\d+ before epoch 9, step 0: .* --precision bf16"):
        fit(model, Colours(24), Colours(9), recipe, seed=0, device="cpu")
    assert torch.equal(model[5].weight, before)


@pytest.mark.parametrize("arithmetic", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_cpu_without_the_precision_in_hardware_is_reported_once(precision, arithmetic, monkeypatch, caplog):
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", lambda: arithmetic)
    _warn_of_emulation.cache_clear()
    for _ in range(2):
        recipe = Recipe(epochs=1, batch_size=8, precision=precision)
        fit(small(), Colours(8), Colours(8), recipe, seed=0, device="cpu")
    told = [record.message for record in caplog.records if "--precision fp32" in record.message]
    assert len(told) == (not arithmetic)
    assert all(precision in message for message in told)
    _warn_of_emulation.cache_clear()


def test_a_compiled_network_keeps_its_parameter_names(monkeypatch):
    compiled, compile = [], torch.compile

    def eagerly(model):
        compiled.append(model)
        return compile(model, backend="eager")

    class Unsized(nn.Module):
        """Has no length; taking its compiled version for a bool would ask for one."""

        def __init__(self):
            super().__init__()
            self.layers = small()

        def forward(self, x):
            return self.layers(x)

    monkeypatch.setattr(torch, "compile", eagerly)
    model, plain = Unsized(), Unsized()
    fit(model, Colours(12), Colours(6), dataclasses.replace(SHORT, compile=True), seed=0, device="cpu")
    fit(plain, Colours(12), Colours(6), SHORT, seed=0, device="cpu")
    assert compiled == [model]
    assert same(bits(model), bits(plain))


def test_gates_get_their_own_learning_rate_and_biases_and_norms_no_decay():
    model = cbam.attach(cbam.build("resnet_tiny", num_classes=10))
    groups = parameter_groups(Recipe(lr=0.1, attention_lr=10.0, decay_matrices_only=True), model)
    told = [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups]
    assert [kind[:2] for kind in told] == [(0.1, 1e-4), (0.1, 0.0), (1.0, 1e-4), (1.0, 0.0)]
    assert sum(count for *_, count in told) == len(list(model.parameters()))
    assert all(p.ndim < 2 for group in groups[1::2] for p in group["params"])
    (one,) = parameter_groups(Recipe(), model)
    assert [id(p) for p in one["params"]] == [id(p) for p in model.parameters()]


def test_every_batchnorm_is_synchronised_including_attentions(monkeypatch):
    """torch cannot synchronise on a CPU, but we can see which norms would be."""
    asked, forward = [], nn.SyncBatchNorm.forward

    def ask(self, x):
        asked.append(self)
        return forward(self, x)

    steps = Steps(Classification(cbam.build("resnet18+cbam", num_classes=3), MEAN, STD))
    TorchSyncBatchNorm().apply(steps)
    norms = [module for module in steps.task.model.modules() if isinstance(module, nn.SyncBatchNorm)]
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", ask)
    steps.task.model.train()(torch.ones(2, 3, 64, 64))
    assert len(norms) == 28
    assert {id(norm) for norm in norms} == {id(norm) for norm in asked}
    TorchSyncBatchNorm().revert(steps)
    assert steps.task.model.eval()(torch.ones(2, 3, 64, 64)).isfinite().all()


def test_synchronised_batchnorm_is_refused_on_cpu():
    with pytest.raises(ConfigError, match="for GPUs only"):
        fit(small(), Colours(12), Colours(6), dataclasses.replace(SHORT, sync_bn=True), seed=0, device="cpu")


def test_a_worker_that_dies_raises_a_data_error():
    # R4
    with pytest.raises(DataError, match="process that loads images died"):
        fit(small(), DiesInWorker(12), Colours(6), SHORT, seed=0, device="cpu", workers=1)


def test_a_data_error_is_raised_unchanged():
    class Broken(Colours):
        def sample(self, epoch, index):
            raise DataError("a.jpg: not an image")

    with pytest.raises(DataError, match=r"^a\.jpg: not an image$"):
        fit(small(), Broken(12), Colours(6), SHORT, seed=0, device="cpu")


def test_an_unknown_device_and_an_absent_gpu_are_refused(monkeypatch):
    # C8
    with pytest.raises(ConfigError, match="auto, cpu or cuda, got 'gpu'"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="no usable GPU") as caught:
        pick_device("cuda")
    assert caught.value.exit_code == 2


def test_attention_at_the_identity_start_learns(digits, network):
    cbam.attach(network)
    before = bits(network)
    fit(network, *digits, SHORT, seed=0, device="cpu")
    last = [n for n in before if ".cbam." in n and n.endswith(("fc2.bias", "bn.bias"))]
    assert last
    assert not [n for n in last if torch.equal(network.state_dict()[n], before[n])]


def test_images_are_normalised_by_the_stated_mean_and_deviation(digits):
    train, _ = digits
    batch = next(iter(loader(train, 40, train=False)))["image"]
    pixels = normalise(batch, train.mean, train.std)
    by_hand = (batch[0, 1, 30, 30].item() / 255 - train.mean[1]) / train.std[1]
    assert pixels[0, 1, 30, 30].item() == pytest.approx(by_hand, rel=1e-5)
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_public_names_are_functions_and_not_submodules():
    program = "from cbam.train import pick_device, run, fit, evaluate, score; assert callable(fit), fit"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
