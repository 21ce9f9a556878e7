"""Mixed positives and negatives against the papers' definitions in loops, with their gradients."""

import math
from dataclasses import replace

import pytest
import torch

from common.errors import UserError
from pretrain.config import load_config
from pretrain.features.augmentations.base import RowRandom
from pretrain.features.mixing import Mixing
from tests.pretrain.model.references import draw, enter, step, unit

TAU, N, D = 0.3, 5, 6
OPTIONS = {
    "pairs": Mixing(num_hardest=3, num_pairs=4),
    "with_anchor": Mixing(num_hardest=2, num_with_anchor=3),
    "all_are_hardest": Mixing(num_pairs=2, num_with_anchor=1),
    "extrapolate": Mixing(extrapolate=2.0),
    "interpolate": Mixing(interpolate=1.6),
    "everything": Mixing(3, 4, 3, 2.0, 1.6),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(mixing, inputs, random, of_batch):
    """One anchor, one negative at a time; the random numbers are drawn in the documented order."""
    own_rows = range(random.rows.start, random.rows.stop)
    anchors, positives, negatives = (unit(x) for x in inputs)
    m, float64 = len(negatives), torch.float64
    sources = [{j % random.num_rows} if of_batch else set() for j in range(m)]
    if mixing.extrapolate:
        lam = 1 + random.beta(mixing.extrapolate, D, dtype=float64)  # in [1, 2]
        anchors, positives = (
            lam * anchors + (1 - lam) * positives,
            lam * positives + (1 - lam) * anchors,
        )
    if mixing.interpolate:
        order = torch.randperm(m, generator=random.generator).tolist()
        lam = RowRandom.whole(random.generator, m).beta(mixing.interpolate, D, dtype=float64)
        negatives = [lam[j] * negatives[j] + (1 - lam[j]) * negatives[order[j]] for j in range(m)]
        sources = [sources[j] | sources[order[j]] for j in range(m)]
    num_own = (m // random.num_rows) * (2 if mixing.interpolate else 1) if of_batch else 0
    num_hardest = min(mixing.num_hardest, m - num_own)
    u = [random.uniform(mixing.num_pairs, 1, dtype=float64)] if mixing.num_pairs else []
    which = [random.integers(num_hardest, mixing.num_pairs) for _ in range(2) if mixing.num_pairs]
    if mixing.num_with_anchor:
        u.append(random.uniform(mixing.num_with_anchor, 1, dtype=float64))
        which.append(random.integers(num_hardest, mixing.num_with_anchor))
    total = torch.zeros((), dtype=float64)
    for row, own in enumerate(own_rows):
        anchor = anchors[row]
        allowed = [n for n, source in zip(negatives, sources, strict=True) if own not in source]
        logits = [anchor @ n for n in allowed]
        ranked = sorted(range(len(allowed)), key=lambda j: -float(logits[j].detach()))
        hardest = [allowed[j].detach() for j in ranked[:num_hardest]]
        for s in range(mixing.num_pairs):
            share = u[0][row, s]
            mix = share * hardest[which[0][row, s]] + (1 - share) * hardest[which[1][row, s]]
            logits.append(anchor @ (mix / mix.norm()))
        for s in range(mixing.num_with_anchor):
            share = 0.5 * u[-1][row, s]
            mix = share * anchor.detach() + (1 - share) * hardest[which[-1][row, s]]
            logits.append(anchor @ (mix / mix.norm()))
        scores = [anchor @ positives[row], *logits]
        total += torch.stack(scores).div(TAU).logsumexp(0) - scores[0] / TAU
    return total / len(own_rows)


@pytest.mark.parity
@pytest.mark.parametrize("of_batch", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_definition_in_value_and_gradient(name, of_batch):
    """Rows 1 to 3 of a batch of 5; what is synthetic gives gradient to the anchor alone."""
    mixing, rows = OPTIONS[name], slice(1, 4)
    anchors, positives = draw(2, 3, D, seed=1)
    negatives = draw(4 * N, D, seed=2)
    inputs = [x.clone().requires_grad_() for x in (anchors, positives, negatives)]
    random = RowRandom(generator(), rows, N)
    loss = mixing.loss(*inputs, temperature=TAU, random=random, of_batch=of_batch)
    expected = by_hand(mixing, inputs, RowRandom(generator(), rows, N), of_batch)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert float(theirs.abs().sum()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("of_batch", [True, False])
def test_empty_queue_and_smallest_batch_have_no_synthetic_negatives(of_batch):
    mixing = OPTIONS["everything"]
    anchors, positives = draw(2, 2, D, seed=5)
    negatives = anchors if of_batch else anchors[:0]
    loss = mixing.loss(
        anchors, positives, negatives, temperature=TAU,
        random=RowRandom.whole(generator(), 2), of_batch=of_batch,
    )  # fmt: skip
    assert math.isfinite(float(loss))
    assert of_batch or float(loss) == 0


# --- in the three objectives


@pytest.fixture(params=["infonce", "simclr", "moco"])
def loss_of(request, make_model, make_views):
    """The loss of a step of an objective, with something in MoCo's queues."""

    def compute(mixing):
        options = {"mixing": mixing, "num_negatives": 32}
        model = make_model(request.param, method="none", objective_options=options)
        enter(model, draw(2, 32, 12, seed=6).float())
        return step(model, make_views()).loss.detach()

    return compute


def test_each_option_reaches_each_loss(loss_of):
    """Harder positives and further negatives raise a loss, interpolated negatives lower it."""
    off = float(loss_of(Mixing(num_hardest=3)))
    losses = {name: float(loss_of(mixing)) for name, mixing in OPTIONS.items()}
    assert all(losses[name] > off for name in ("pairs", "with_anchor", "extrapolate"))
    assert losses["interpolate"] < off
    assert len({round(loss, 6) for loss in losses.values()}) == len(losses)


def test_positives_and_negatives_are_those_of_the_plain_loss(loss_of, monkeypatch):
    """Seen where a positive is extrapolated by nothing."""
    monkeypatch.setattr(RowRandom, "beta", lambda *a, **k: torch.zeros(()))
    torch.testing.assert_close(loss_of(Mixing(extrapolate=2.0)), loss_of(Mixing()))


def test_config_has_the_section_where_there_are_negatives(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("objective: {name: moco, mixing: {num_pairs: 8, num_hardest: 16}}\n")
    objective = load_config(path, ["objective.mixing.interpolate=1.6"]).objective
    assert vars(objective)["mixing"] == Mixing(16, 8, interpolate=1.6)
    with pytest.raises(UserError, match=r"objective\.mixing\.num_pairs must be >= 0, got -1"):
        load_config(path, ["objective.mixing.num_pairs=-1"])
    with pytest.raises(UserError, match=r"objective\.mixing\.num_hardest must be >= 1, got 0"):
        replace(Mixing(), num_hardest=0)
    path.write_text("objective: {name: byol, mixing: {num_pairs: 8}}\n")
    with pytest.raises(UserError, match=r"objective\.mixing"):
        load_config(path)
