import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from convoy.training import checkpoints, nets
from convoy.training.data import ImageSet
from convoy.training.errors import DivergedError, RecipeError, StoppedError
from convoy.training.evaluate import Evaluation, fit_temperature, predict
from convoy.training.loop import Trainer, choose_precision
from convoy.training.normalization import Normalization, measure
from convoy.training.optim import layer_depths, make_optimizer, orthogonalized, penalty
from convoy.training.readers import MemoryReader
from convoy.training.recipe import Recipe, load_recipe

NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def evaluate(net: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> Evaluation:
    return Evaluation(predict(net, images.split(batch_size)), labels)


def make_reader(images: Tensor, labels: Tensor) -> MemoryReader:
    return MemoryReader(ImageSet(images.numpy(), labels.numpy()), torch.device("cpu"))


def make_images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose class is their brightness."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    noise = torch.randint(0, 60, (count, 8, 8, 3), generator=draws)
    return (noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


def make_trainer(valid: tuple[Tensor, Tensor] | None = None, **settings: object) -> Trainer:
    # In float32, whose rounding the assertions' tolerances fit on every processor.
    ours = {"model": "net", "batch_size": 16, "image_size": 8, "lr": 0.1, "precision": "float32"}
    recipe = Recipe(**{**ours, **settings})  # type: ignore[arg-type]
    torch.manual_seed(recipe.seed)
    own = {"dropout": 0.2} if recipe.model == "net" else {}
    net = nets.create(recipe.model, n_classes=4, image_size=8, **own)
    readers = (make_reader(*images) for images in (make_images(70), valid or make_images(30, 1)))
    return Trainer(net, recipe, NORMALIZATION, *readers)


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.net.state_dict().values()])


def run(trainer: Trainer, epochs: int, stop: Callable[[], bool] = lambda: False) -> None:
    for _ in range(epochs):
        trainer.run_epoch(lambda: None, stop)


def test_uniform_logits_cost_ln_10_whatever_the_batch_size() -> None:
    class Uniform(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), 10)

    images, labels = torch.zeros(130, 3, 4, 4), torch.arange(130) % 10
    for batch_size in (1, 64, 130):
        loss = evaluate(Uniform(), images, labels, batch_size).loss
        assert loss == pytest.approx(math.log(10), rel=1e-6)


def test_metrics_depend_on_neither_batch_size_nor_order() -> None:
    torch.manual_seed(0)
    net = nets.create("net_res_deep", n_blocks=2, image_size=8)
    net.train()(torch.randn(32, 3, 8, 8))
    images, labels = torch.randn(50, 3, 8, 8), torch.arange(50) % 10
    order = torch.randperm(50)
    whole = evaluate(net, images, labels, 50)
    shuffled = evaluate(net, images[order], labels[order], 7)
    assert shuffled.accuracy == whole.accuracy
    assert shuffled.loss == pytest.approx(whole.loss, rel=1e-5)


def test_validation_changes_no_buffer_and_gives_the_mode_back() -> None:
    net = nets.create("net_res_deep", n_blocks=2, image_size=8)
    net.train()
    net.resblocks[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    evaluate(net, torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.resblocks[0].training
    assert not net.resblocks[1].training


def test_training_reports_the_loss_of_a_sample() -> None:
    """With a rate near 0 the mean over batches of 16, 16, 16, 16 and 6 is that of all samples."""
    trainer = make_trainer(lr=1e-12)
    trainer.net.dropout.p = 0.0
    expected = trainer.evaluate(make_reader(*make_images(70)))
    result = trainer.run_epoch(lambda: None)
    assert result.train_loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.train_accuracy == pytest.approx(expected.accuracy)


def test_it_learns() -> None:
    trainer = make_trainer(momentum=0.9)
    first = trainer.run_epoch(lambda: None)
    run(trainer, 8)
    last = trainer.run_epoch(lambda: None)
    assert last.valid_loss < first.valid_loss / 2
    assert last.valid_accuracy > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "schedule": "triangular", "warmup_share": 0.2},
        {"optimizer": "adamw", "average": "ema", "ema_decay": 0.9, "schedule": "cosine"},
        {"optimizer": "muon", "momentum": 0.85, "schedule": "one_cycle", "warmup_share": 0.3},
        {"average": "lookahead", "flip": "alternating", "shift_px": 1, "cutout_px": 3},
        {"schedule": "plateau", "lr": 2.0, "clip_norm": 0.5, "flip": "random"},
        {"model": "resnet18", "start_px": 4, "growth_share": 0.8, "cutout_px": 3},
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(
    settings: dict[str, object], tmp_path: Path
) -> None:
    unbroken = make_trainer(epochs=4, **settings)
    run(unbroken, 4)
    stopped = make_trainer(epochs=4, **settings)
    run(stopped, 2)
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    resumed = make_trainer(epochs=4, **settings)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(resumed, 2)
    assert torch.equal(weights(resumed), weights(unbroken))


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    runs = [make_trainer(seed=seed, shift_px=1) for seed in (3, 3, 4)]
    for trainer in runs:
        run(trainer, 2)
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(weights(runs[0]), weights(runs[2]))


@pytest.mark.parametrize("decay_all", [True, False])
def test_a_step_with_l2_equals_a_step_with_twice_the_weight_decay(decay_all: bool) -> None:
    stepped = []
    for settings in ({"l2": 0.03}, {"weight_decay": 0.06}):
        trainer = make_trainer(batch_size=70, decay_all=decay_all, **settings)
        run(trainer, 1)
        stepped.append(weights(trainer))
    torch.testing.assert_close(stepped[0], stepped[1], atol=1e-6, rtol=1e-6)


def test_penalties_are_the_norms_and_leave_biases_out() -> None:
    net = nets.create("net")
    kernels = [p.detach() for p in net.parameters() if p.ndim > 1]
    absolute = sum(float(p.abs().sum()) for p in kernels)
    squared = sum(float((p**2).sum()) for p in kernels)
    both = penalty(net, Recipe(l1=0.5, l2=2.0))
    assert float(both.detach()) == pytest.approx(0.5 * absolute + 2 * squared, rel=1e-5)


def test_the_penalty_is_reported_apart_from_the_data_loss() -> None:
    plain, penalized = make_trainer(lr=1e-12), make_trainer(lr=1e-12, l2=5.0)
    one, other = plain.run_epoch(lambda: None), penalized.run_epoch(lambda: None)
    assert other.train_loss == pytest.approx(one.train_loss, rel=1e-6)
    assert one.penalty == 0
    assert other.penalty > 10


def test_every_parameter_is_optimized_once_and_norm_biases_faster() -> None:
    net = nets.create("net_res_deep", n_blocks=2)
    recipe = Recipe(lr=0.1, norm_bias_lr_factor=64, weight_decay=0.1)
    groups = make_optimizer(net, recipe).param_groups
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in net.parameters())
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(net.resblocks[0].batch_norm.bias)] == pytest.approx(6.4)
    assert rates[id(net.fc1.bias)] == pytest.approx(0.1)


def test_muon_moves_kernels_by_orthogonal_steps_and_the_rest_as_sgd() -> None:
    torch.manual_seed(0)
    net = nets.create("airbench", widths=(8, 8, 8))
    before, twin = copy.deepcopy(net), copy.deepcopy(net)
    settings = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01, "norm_bias_lr_factor": 4.0}
    images = torch.randn(4, 3, 32, 32)
    for model, name in ((net, "muon"), (twin, "sgd")):
        model(images).square().sum().backward()
        make_optimizer(model, Recipe(optimizer=name, muon_lr=0.3, **settings)).step()  # type: ignore[arg-type]
    for (name, moved), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        if not (moved.requires_grad and moved.ndim == 4):
            torch.testing.assert_close(moved, other, msg=name)
    kernel, old = (model.blocks[0].conv2.weight.detach() for model in (net, before))
    step = (old * 8**0.5 / old.norm() - kernel).flatten(1) / 0.3
    gradient = net.blocks[0].conv2.weight.grad.flatten(1)
    torch.testing.assert_close(step, orthogonalized(gradient), atol=1e-5, rtol=1e-4)


def test_muon_takes_the_same_steps_in_bfloat16() -> None:
    torch.manual_seed(0)
    steps = []
    for precision in ("float32", "bfloat16"):
        settings = {"optimizer": "muon", "precision": precision, "muon_lr": 0.3}
        trainer = make_trainer(model="net", **settings)
        before = trainer.net.conv2.weight.clone()
        run(trainer, 1)
        steps.append((trainer.net.conv2.weight - before).flatten())
    assert not torch.equal(*steps)
    assert functional.cosine_similarity(*steps, dim=0) > 0.95


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_orthogonalized_evens_the_singular_values_and_keeps_the_vectors(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.T @ orthogonalized(matrix, steps=5) @ right.T
    torch.testing.assert_close(core, core.diagonal().diag(), atol=1e-4, rtol=0)
    assert values.max() / values.min() > 2
    assert core.diagonal().max() / core.diagonal().min() < 2
    assert core.diagonal().mean() == pytest.approx(1, abs=0.2)


def test_the_plateau_schedule_follows_validation_not_training() -> None:
    """Training labels are learnable, validation labels are noise: only validation stagnates."""
    images, labels = make_images(30, seed=1)
    settings = {"schedule": "plateau", "epochs": 40, "lr": 0.05, "momentum": 0.9}
    trainer = make_trainer((images, labels.flip(0)), **settings)
    results = [trainer.run_epoch(lambda: None) for _ in range(25)]
    assert results[-1].lr < 0.05
    assert results[-1].train_loss < results[0].train_loss


def test_bfloat16_learns() -> None:
    half, full = (make_trainer(momentum=0.9, precision=name) for name in ("bfloat16", "float32"))
    run(half, 10)
    run(full, 10)
    # Twice that of chance: how fast it learns depends on the processor's way of rounding.
    assert half.evaluate(make_reader(*make_images(30, 1))).accuracy > 0.5
    assert not torch.equal(weights(half), weights(full))
    assert all(p.dtype == torch.float32 for p in half.net.parameters())


@pytest.mark.parametrize("has_amx", [True, False])
def test_a_cpu_with_amx_trains_in_bfloat16_by_default(
    has_amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = {"amx_bf16": has_amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    named = "bfloat16" if has_amx else "float32"
    default, explicit = (make_trainer(precision=name) for name in ("auto", named))
    run(default, 1)
    run(explicit, 1)
    assert default.precision is getattr(torch, named)
    assert torch.equal(weights(default), weights(explicit))
    for name in ("lecture", "lecture-resnet", "digits"):
        recipe = load_recipe(name)
        net = nets.create(recipe.model, **recipe.model_arguments)
        assert choose_precision(recipe, torch.device("cpu"), net) is torch.float32


def test_no_cpu_trains_in_bfloat16_where_a_map_is_smaller_than_the_stride(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At 8 px the last stage of resnet18 gets one pixel, which its stride of 2 leaves."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert make_trainer(model="resnet18", precision="auto").precision is torch.float32
    assert "float32 instead of bfloat16: with images of 8 px resnet18" in caplog.text
    with pytest.raises(RecipeError, match="precision: expected float32 on a CPU, got bfloat16"):
        make_trainer(model="resnet18", precision="bfloat16")
    growing = {"growth_share": 0.5, "start_px": 16, "image_size": 32, "precision": "auto"}
    net, cpu = nets.create("resnet18"), torch.device("cpu")
    assert choose_precision(Recipe(**growing), cpu, net) is torch.float32
    assert choose_precision(Recipe(**growing | {"start_px": 20}), cpu, net) is torch.bfloat16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own making
def test_a_compiled_step_is_the_eager_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and differentiated as for any back end; compiling C++ takes too long for a test."""
    compiler = Mock(wraps=partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", compiler)
    eager, compiled = (make_trainer(compile=flag, batch_size=35) for flag in (False, True))
    for trainer in (eager, compiled):
        trainer.net.dropout.p = 0.0
        run(trainer, 1)
    torch.testing.assert_close(weights(compiled), weights(eager), atol=1e-5, rtol=1e-4)
    compiler.assert_called_once_with(compiled.net)
    assert set(compiled.state_dict()["net"]) == set(eager.state_dict()["net"])


def test_training_images_grow_and_validation_images_are_whole() -> None:
    trainer = make_trainer(model="resnet18", epochs=2, start_px=4, growth_share=0.8)
    seen: list[tuple[bool, int]] = []
    trainer.net.register_forward_pre_hook(
        lambda net, inputs: seen.append((net.training, inputs[0].shape[-1]))
    )
    run(trainer, 2)
    assert trainer.steps_per_epoch == 5
    assert [size_px for training, size_px in seen if training] == [4] * 8 + [8] * 2
    assert {size_px for training, size_px in seen if not training} == {8}


def test_images_are_evaluated_some_at_a_time() -> None:
    trainer = make_trainer()
    sizes: list[int] = []
    trainer.net.register_forward_pre_hook(lambda _net, inputs: sizes.append(len(inputs[0])))
    evaluation = trainer.evaluate(make_reader(*make_images(1100)))
    assert len(evaluation.labels) == len(evaluation.logits) == sum(sizes) == 1100
    assert max(sizes) <= 500


def test_a_nan_loss_stops_with_advice() -> None:
    with pytest.raises(DivergedError, match="lower the learning rate"):
        run(make_trainer(lr=1e30, l2=1.0), 3)


def test_a_batch_larger_than_the_data_is_rejected() -> None:
    with pytest.raises(RecipeError, match="at most the 70 training images, got 71"):
        make_trainer(batch_size=71)


def test_measured_constants_are_those_of_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 4, 3), np.uint8)
    measured = measure(ImageSet(pixels, np.zeros(9, np.int64)))
    np.testing.assert_allclose(measured.mean, (pixels / 255).mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(measured.std, (pixels / 255).std((0, 1, 2)), rtol=1e-9)


def test_normalization_equals_torchvisions() -> None:
    from torchvision.transforms import v2

    pixels = make_images(3)[0]
    norm = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(norm.mean, norm.std)])
    torch.testing.assert_close(norm.apply(pixels), theirs(pixels.permute(0, 3, 1, 2)))


def test_the_temperature_undoes_a_known_scale() -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(4000, 5)
    labels = torch.multinomial(torch.softmax(logits, 1), 1)[:, 0]
    assert fit_temperature(Evaluation(3 * logits, labels)) == pytest.approx(3, rel=0.05)


def test_accuracy_after_reloading_is_equal_to_the_bit(tmp_path: Path) -> None:
    from tests.training.test_checkpoints import make_checkpoint

    trainer = make_trainer()
    run(trainer, 1)
    arguments = {"n_classes": 4, "image_size": 8}
    kept = replace(
        make_checkpoint(n_blocks=1),
        architecture=checkpoints.Architecture("net", arguments),
        state_dict=trainer.net.state_dict(),
    )
    checkpoints.save(tmp_path / "best.pt", kept)
    net = checkpoints.load(tmp_path / "best.pt").build_net()
    images, labels = make_images(30, seed=1)
    ours = trainer.evaluate(make_reader(images, labels))
    assert torch.equal(evaluate(net, NORMALIZATION.apply(images), labels).logits, ours.logits)


SETTINGS = (
    {"momentum": 0.9, "shift_px": 1, "flip": "random", "cutout_px": 2},
    {"average": "ema", "ema_decay": 0.9, "mixup_alpha": 0.4, "cutmix_alpha": 1.0},
    {"balance": "sampling", "average": "lookahead", "accumulate": 2},
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_run_stopped_after_any_step_resumes_to_the_same_weights(
    settings: dict[str, object],
) -> None:
    whole = make_trainer(**settings)
    expected = [whole.run_epoch(lambda: None) for _ in range(2)]
    for stop_after in (1, 3, 4, 6):
        stopped = make_trainer(**settings)
        asked = iter([False] * (stop_after - 1) + [True])
        with pytest.raises(StoppedError):
            run(stopped, 9, partial(next, asked))
        state = copy.deepcopy(stopped.state_dict())
        resumed = make_trainer(**settings)
        resumed.load_state_dict(state)
        assert resumed.steps_left == stopped.steps_left < whole.steps_left + 10
        while resumed.epoch < 2:
            result = resumed.run_epoch(lambda: None)
        assert replace(result, images_per_s=0) == replace(expected[1], images_per_s=0), stop_after
        assert torch.equal(weights(resumed), weights(whole)), stop_after


def test_a_stop_while_validating_loses_nothing() -> None:
    whole = make_trainer()
    expected = whole.run_epoch(lambda: None)
    asked = iter([False] * whole.steps_per_epoch + [True])
    stopped = make_trainer()
    with pytest.raises(StoppedError):
        stopped.run_epoch(lambda: None, lambda: next(asked))
    assert stopped.epoch == 0
    assert stopped.steps_left == whole.steps_left
    resumed = make_trainer()
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    again = resumed.run_epoch(lambda: None)
    assert replace(again, images_per_s=0) == replace(expected, images_per_s=0)


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    """70 images: batches of 16, 16, 16, 16 and 6 make steps of 32, 32 and 6."""
    small = make_trainer(accumulate=2, lr=0.05)
    large = make_trainer(batch_size=32, lr=0.05)
    for trainer in (small, large):
        trainer.net.dropout.p = 0.0
        trainer.run_epoch(lambda: None)
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-4, atol=1e-6)


def uneven(count: int) -> tuple[Tensor, Tensor]:
    """Images of which nine in ten are of class 0."""
    images, labels = make_images(4 * count)
    members = [(labels == number).nonzero()[:, 0] for number in range(4)]
    chosen = torch.cat([members[0], *(few[: count // 9] for few in members[1:])])
    return images[chosen], labels[chosen]


@pytest.mark.parametrize("balance", ["none", "weights", "sampling"])
def test_balance_evens_out_what_the_classes_weigh(balance: str) -> None:
    recipe = Recipe(model="net", batch_size=30, image_size=8, balance=balance)  # type: ignore[arg-type]
    torch.manual_seed(0)
    net = nets.create("net", n_classes=4, image_size=8)
    reader = make_reader(*uneven(90))
    trainer = Trainer(net, recipe, NORMALIZATION, reader, reader)
    seen = torch.cat([labels for _, labels, _ in trainer._batches()])
    shares = torch.bincount(seen, minlength=4) / len(seen)
    weight = trainer._class_weights if balance == "weights" else torch.ones(4)
    weighed = shares * weight / (shares * weight).sum()
    if balance == "none":
        assert weighed[0] > 0.7
    else:
        torch.testing.assert_close(weighed, torch.full((4,), 0.25), atol=0.12, rtol=0)


def test_rates_fall_layer_by_layer_from_the_head() -> None:
    net = nets.create("resnet18")
    depths = layer_depths(net)
    parameters = dict(net.named_parameters())
    found = {name: depths[id(parameter)] for name, parameter in parameters.items()}
    assert found["fc.weight"] == found["fc.bias"] == 0
    assert found["layer4.1.conv1.weight"] == 1
    assert found["layer1.0.bn2.bias"] == 8
    assert found["conv1.weight"] == 10
    optimizer = make_optimizer(net, Recipe(model="resnet18", layer_decay=0.5, optimizer="adamw"))
    rates = {
        id(parameter): group["peak_lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(rates) == len(parameters)
    assert rates[id(net.fc.weight)] == 0.01
    assert rates[id(net.layer4[1].conv1.weight)] == 0.005
    assert rates[id(net.conv1.weight)] == pytest.approx(0.01 / 2**10)
