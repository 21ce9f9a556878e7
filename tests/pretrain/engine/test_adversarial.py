"""Adversarial examples: they raise the loss within their bound and leave everything else alone."""

import copy
from functools import partial

import pytest
import torch

from common.backbone import Preprocessing
from pretrain.config import AdversarialConfig, DataConfig, OptimConfig
from pretrain.engine.accumulation import Gradients, perturb
from pretrain.features.augmentations.base import fa_generator
from pretrain.objectives.base import Pair
from tests.pretrain.engine.run_helpers import LIGHT, SMALL
from tests.pretrain.model.references import compare, enter

BASE = SMALL | LIGHT
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SHAPE = (1, 3, 1, 1)


def to_pixels(images):
    return images * torch.tensor(STD).view(SHAPE) + torch.tensor(MEAN).view(SHAPE)


def normalised(pixels):
    return (pixels - torch.tensor(MEAN).view(SHAPE)) / torch.tensor(STD).view(SHAPE)


@pytest.fixture
def pictures():
    return normalised(torch.rand(4, 3, 8, 8))


@pytest.fixture
def attack():
    def attacked(loss_of, images, epsilon=4.0, num_steps=1, step_size=None):
        adversarial = AdversarialConfig(epsilon, num_steps, step_size)
        return perturb(loss_of, images, adversarial, Preprocessing(MEAN, STD))

    return attacked


def linear(weight):
    return lambda x: (x * weight).sum()


def test_fgsm_of_a_linear_loss_equals_its_closed_form(pictures, attack):
    weight = torch.randn(4, 3, 8, 8)
    moved = to_pixels(attack(linear(weight), pictures))
    expected = (to_pixels(pictures) + 4 / 255 * weight.sign()).clamp(0, 1)
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_bound_and_valid_pixels(pictures, attack, num_steps):
    moved = attack(lambda x: (x**3).sin().sum(), pictures, num_steps=num_steps)
    pixels = to_pixels(moved)
    assert (pixels - to_pixels(pictures)).abs().max() <= 4 / 255 + 1e-6
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert not moved.requires_grad


def test_pgd_finds_more_than_fgsm_where_the_loss_is_curved(attack):
    """From pixel 0.5 the loss rises a little to the right, but its maximum is just there."""
    at = 0.5 + 1.5 / 255
    grey = normalised(torch.full((1, 3, 8, 8), 0.5))

    def loss_of(x):
        return -((to_pixels(x) - at) ** 2).sum()

    first = attack(loss_of, grey, epsilon=8.0)
    change = to_pixels(first) - to_pixels(grey)
    torch.testing.assert_close(change, torch.full_like(change, 8 / 255), atol=1e-6, rtol=0)
    fgsm = loss_of(first)
    pgd = loss_of(attack(loss_of, grey, epsilon=8.0, num_steps=40))
    assert fgsm < loss_of(grey) < pgd


def test_step_size_bounds_a_step(pictures, attack):
    inside = normalised(to_pixels(pictures).clamp(0.1, 0.9))
    moved = attack(linear(torch.ones(1)), inside, num_steps=2, step_size=0.5)
    change = to_pixels(moved) - to_pixels(inside)
    torch.testing.assert_close(change, torch.full_like(change, 1 / 255), atol=1e-6, rtol=0)


DATA = DataConfig(pixel_mean=MEAN, pixel_std=STD)


@pytest.fixture
def views():
    return normalised(torch.rand(16, 3, 32, 32)).view(2, 8, 3, 32, 32)


def gradients(model, **optim):
    return Gradients(
        model, model.online, OptimConfig(**optim), lambda: torch.autocast("cpu", enabled=False)
    )


GENERATOR = partial(fa_generator, 0, 3, torch.device("cpu"))


def attacked(model, views, *, micro=0, **adversarial):
    return gradients(model, micro_batch_size=micro).attacked(
        views, GENERATOR, 0.5, AdversarialConfig(**adversarial), DATA
    )


def prediction_loss(model, views):
    """Of view 1 predicting view 2: what the gradient of view 1 sees where targets have none."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        seen = twin.online(views, compare(twin, views, GENERATOR()))
        pair = Pair(seen.online, seen.target, seen.projection, 1)
        return float(twin.objective.loss(pair, twin.objective_state))


@pytest.mark.parametrize("objective", ["byol", "infonce"])
def test_view_1_predicts_view_2_worse_and_view_2_stays(make_model, views, objective):
    model = make_model(objective, method="nn")
    model.queue.put(torch.randn(64, 12))
    enter(model, torch.randn(2, 64, 12))
    moved = attacked(model, views, epsilon=0.001)  # so small that the gradient is right all the way
    assert prediction_loss(model, moved) > prediction_loss(model, views)
    assert torch.equal(moved[1], views[1])
    change = (to_pixels(moved[0]) - to_pixels(views[0])).abs()
    assert 0.0009 / 255 < change.max() < 0.0011 / 255


def test_small_crops_stay_as_they_are(make_model, views):
    model, small = make_model("byol", method="none"), torch.randn(2, 8, 3, 16, 16)
    given = [*views, *small]
    moved = attacked(model, given, epsilon=4.0)
    assert not torch.equal(moved[0], views[0])
    assert all(torch.equal(a, b) for a, b in zip(moved[1:], given[1:], strict=True))


def test_more_steps_raise_it_further(make_model, views):
    model = make_model("byol", method="mask")
    one, ten = (attacked(model, views, epsilon=4.0, num_steps=n) for n in (1, 10))
    assert prediction_loss(model, ten) > prediction_loss(model, one)


def test_step_size_reaches_the_search(make_model, views):
    moved = attacked(make_model("byol", method="mask"), views, epsilon=4.0, step_size=1.0)
    change = (to_pixels(moved[0]) - to_pixels(views[0])).abs()
    assert change.max() <= 1 / 255 + 1e-6


def test_search_leaves_model_and_random_state_as_they_were(make_model, views):
    model = make_model("byol", method="nn+noise")
    model.queue.put(torch.randn(64, 12))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    attacked(model, views, epsilon=4.0, num_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_each_micro_batch_is_attacked_by_its_own_loss(make_model, views):
    model = make_model("byol", method="none")
    moved = attacked(model, views, micro=4, epsilon=4.0)
    first = attacked(model, views[:, :4], epsilon=4.0)
    torch.testing.assert_close(moved[0][:4], first[0])
    assert not torch.equal(moved[0][4:], views[0, 4:])


def test_off_hands_on_the_views_themselves(make_model, views):
    assert attacked(make_model("byol", method="none"), views, epsilon=0.0) is views


def test_option_of_a_run_changes_what_is_learnt(make_run):
    def weights(name, *overrides):
        run = make_run("fa.method=mask", *overrides, name=name)
        for batch in run.batches.epoch(0):
            run.step(batch)
        return torch.cat([p.detach().flatten() for p in run.task.model.online.parameters()])

    off = weights("off")
    assert torch.equal(off, weights("zero", "adversarial.epsilon=0", "adversarial.num_steps=3"))
    on = weights("on", "adversarial.epsilon=4")
    assert not torch.equal(off, on)
    assert bool(on.isfinite().all())
