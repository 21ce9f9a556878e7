"""Masked prediction: loss, masks and gradients against the definition; refusals; a whole run."""

import copy
from functools import partial

import pytest
import torch

from common.errors import UserError
from pretrain.config import load_config
from pretrain.features.augmentations.base import AugmentationContext, RowRandom, fa_generator
from pretrain.features.augmentations.mask import Mask
from pretrain.objectives.base import Pair
from pretrain.objectives.masked_prediction import MaskedPrediction, masked_prediction_loss
from tests.pretrain.model.references import assert_same, byol, cosine, draw, step

FA = {"method": "mask", "stop_gradient": False, "mask": {"ratio": 0.4}}


@pytest.mark.parity
def test_loss_equals_a_loop_over_positions():
    p, t = draw(2, 4, 5, 3, 2, seed=1)
    is_masked = draw(4, 3, 2, seed=2) > -0.5
    assert bool(is_masked.flatten(1).any(dim=1).all())
    total = 0.0
    for sample in range(4):
        places = is_masked[sample].nonzero().tolist()
        terms = [2 - 2 * cosine(p[sample, :, y, x].tolist(), t[sample, :, y, x].tolist())
                 for y, x in places]  # fmt: skip
        total += sum(terms) / len(terms) / 4
    assert float(masked_prediction_loss(p, t, is_masked)) == pytest.approx(total, abs=1e-12)
    with pytest.raises(AssertionError):
        masked_prediction_loss(p, t[:1], is_masked)


# --- the step


def map_of(network, view):
    """g(f(view)), the projector at one position after another where BN does not mix them."""
    res5 = network.backbone(view, as_map=True)
    n, _, height, width = res5.shape
    rows = torch.stack([res5[i, :, y, x] for i in range(n) for y in range(height)
                        for x in range(width)])  # fmt: skip
    return torch.stack(list(network.projector(rows).view(n, height, width, -1).unbind(3)), dim=1)


def masks_of(random, n, num_positions, ratio):
    """The positions below the ratio, without that of the largest draw, with that of the least."""
    masked = []
    for row in random.uniform(num_positions).tolist():
        order = sorted(range(num_positions), key=row.__getitem__)
        few = {i for i in order if row[i] < ratio} - {order[-1]} | {order[0]}
        masked.append([i in few for i in range(num_positions)])
    return torch.tensor(masked)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (0.0, {}),
        (0.7, {}),
        (1.0, {"num_features": 3}),
        (1.0, {"num_features": 2, "feature_loss": "free", "strength": 0.5}),
    ],
)
def test_step_equals_its_definition(make, make_views, weight, options):
    model = make("masked_prediction", options={"global_weight": weight}, **FA, **options)
    twin, views = copy.deepcopy(model), make_views(n=4, size=96)
    random = RowRandom.whole(fa_generator(0, 0, views.device), 4)
    z = [map_of(twin.online, view) for view in views]
    with torch.no_grad():
        t = [map_of(twin.ema, view) for view in views]
    expected, num = 0, options.get("num_features", 1)
    for a, b in ((1, 0), (0, 1)):
        masks = [masks_of(random, 4, 9, 0.4 * options.get("strength", 1)) for _ in range(num)]
        for mask in masks:
            mask = mask.view(4, 1, 3, 3)
            p = twin.online.predictor(torch.where(mask, 0, z[a]))
            local = 0
            for i in range(4):
                places = mask[i, 0].nonzero().tolist()
                own = [torch.stack([x[i, :, y, w] for y, w in places]) for x in (p, t[a])]
                local += byol(*own) / 4
            term = local + weight * byol(p.mean(dim=(2, 3)), t[b].mean(dim=(2, 3)))
            expected += term / (1 if options.get("feature_loss") == "free" else num)
    output = step(model, views)
    assert_same(model, twin, output.loss, expected)
    assert output.online.shape == output.augmented.shape == output.entering.shape == (4, 12)
    torch.testing.assert_close(output.keys, torch.stack([x.mean(dim=(2, 3)) for x in t]))
    assert "feature_std" in output.figures()


def test_gradient_reaches_the_map_at_visible_positions_only(make, make_views):
    model = make("masked_prediction", options={"global_weight": 0.0}, **FA).eval()
    maps, seen = [], []
    model.online.backbone.register_forward_hook(lambda *a: maps.append(a[2]))
    model.online.backbone.register_forward_hook(lambda *a: a[2].retain_grad())
    model.online.predictor.register_forward_pre_hook(lambda _, a: seen.append(a[0].detach()))
    step(model, make_views(size=96)).loss.backward()
    for view, masked in zip((1, 0), seen, strict=True):
        is_masked = (masked == 0).all(dim=1)
        reached = maps[view].grad.abs().sum(dim=1) > 0
        assert 0.2 < float(is_masked.float().mean()) < 0.6
        assert not bool((reached & is_masked).any())
        assert float((reached | is_masked).float().mean()) > 0.9
    for part in (model.online.backbone, model.online.projector, model.online.predictor):
        assert all(p.grad is not None for p in part.parameters())


def test_masks_have_their_ratio_and_leave_something_to_see_and_to_predict():
    z = torch.ones(4000, 3, 4, 4)
    context = partial(AugmentationContext, RowRandom.whole(fa_generator(0, 0, z.device), 4000))
    masks = {}
    for ratio, strength in ((0.4, 1.0), (0.8, 0.5), (0.0, 1.0), (0.99, 1.0)):
        out = Mask(ratio)(z, None, context(strength))
        assert torch.equal(out[:, 0], out[:, 2])
        masks[ratio] = (out[:, 0] == 0).flatten(1)
        counts = masks[ratio].sum(dim=1)
        assert int(counts.min()) >= 1
        assert int(counts.max()) <= 15
    for ratio in (0.4, 0.8):
        share = masks[ratio].float()
        assert float(share.mean()) == pytest.approx(0.4, abs=0.01)
        assert float((share.mean(dim=0) - 0.4).abs().max()) < 0.04  # each position
    assert bool((masks[0.0].sum(dim=1) == 1).all())
    assert float(masks[0.99].sum(dim=1).float().mean()) > 14.5
    assert not torch.equal(masks[0.4], masks[0.8])


def test_the_global_weight_scales_the_loss_between_the_views():
    p, t, other = draw(3, 4, 5, 2, 2, seed=4)
    augmented = p * (torch.arange(4).view(2, 2) > 0)
    losses = [
        MaskedPrediction(global_weight=weight).loss(Pair(p, other, other, 0, t, augmented), None)
        for weight in (0, 1, 3)
    ]
    expected = byol(p.mean(dim=(2, 3)), other.mean(dim=(2, 3)))
    torch.testing.assert_close(losses[1] - losses[0], expected)
    torch.testing.assert_close(losses[2] - losses[0], 3 * expected)


# --- what cannot work


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fa.method=none", r"fa\.method=none .*masked positions.*use fa\.method=mask"),
        ("fa.method=nn", r"fa\.method=nn .*use fa\.method=mask"),
        ("fa.method=mask+noise", r"fa\.method=mask\+noise .*use fa\.method=mask"),
        ("fa.architecture=parallel", r"fa\.architecture=parallel .*behind the mask; use .*=pre"),
        ("fa.views=first", r"fa\.views=first .*use fa\.views=both"),
        ("fa.stop_gradient=true", r"fa\.stop_gradient=true .*use fa\.stop_gradient=false"),
        ("data.image_size=32", r"data\.image_size=32: .* 1 x 1 positions.* needs 4; use .*=33 or"),
        ("objective.global_weight=-1", r"objective\.global_weight must be >= 0, got -1"),
        ("objective.stop_gradient=false", r"the target of masked_prediction has no gradient"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(override, message):
    load_config("masked_prediction", ["data.image_size=33", "fa.architecture=pre"])
    with pytest.raises(UserError, match=message):
        load_config("masked_prediction", [override])
