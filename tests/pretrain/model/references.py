"""Base methods and FA written a second time, from their definitions, with plain tensor operations.

They know nothing of the package but the weights: features come from the same modules, the rest is
written out here.
"""

import math
from functools import partial

import torch

from pretrain.features.augmentations.base import RowRandom, fa_generator


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def infonce(rows, columns, tau):
    """Mean over i of -log softmax_j(rows_i . columns_j / tau)[i]."""
    logits = unit(rows) @ unit(columns).T / tau
    return -(logits.diagonal() - logits.logsumexp(dim=1)).mean()


def byol(p, t):
    """Squared distance of unit vectors."""
    return ((unit(p) - unit(t)) ** 2).sum(dim=1).mean()


def nt_xent(first, second, tau):
    """2n samples, each against the 2n - 1 others (SimCLR, eq. 1)."""
    both, n = unit(torch.cat([first, second])), len(first)
    scores = (both @ both.T / tau).exp()
    positives = scores[torch.arange(2 * n), torch.arange(2 * n).roll(n)]
    return -(positives / (scores.sum(dim=1) - scores.diagonal())).log().mean()


def anchored_nt_xent(anchors, columns, others, tau):
    """Anchor i against all columns, of which i is its positive, and all others but its own."""
    to_columns = (unit(anchors) @ unit(columns).T / tau).exp()
    to_others = (unit(anchors) @ unit(others).T / tau).exp() * (1 - torch.eye(len(anchors)))
    return -(to_columns.diagonal() / (to_columns.sum(dim=1) + to_others.sum(dim=1))).log().mean()


def moco(queries, keys, negatives, tau):
    """-log of the positive key's share among it and the queue."""
    positive = ((unit(queries) * unit(keys)).sum(dim=1) / tau).exp()
    negative = (unit(queries) @ unit(negatives).T / tau).exp().sum(dim=1)
    return -(positive / (positive + negative)).log().mean()


def negative_cosine(p, t):
    return -(unit(p) * unit(t)).sum(dim=1).mean()


def sinkhorn(scores, epsilon, num_iterations):
    """Codes: rows of the plan in turn get mass 1 / K per prototype and 1 / n per sample."""
    n, k = scores.shape
    plan = (scores.detach() / epsilon).exp()
    for _ in range(num_iterations):
        plan = plan / plan.sum(dim=0, keepdim=True) / k
        plan = plan / plan.sum(dim=1, keepdim=True) / n
    return plan * n


def swav(features, targets, prototypes, tau, epsilon=0.05, num_iterations=3):
    """Cross entropy of one view's scores against the codes of the other view."""
    scores, directions = unit(features), unit(prototypes).T
    codes = sinkhorn(unit(targets) @ directions, epsilon, num_iterations)
    return -(codes * (scores @ directions / tau).log_softmax(dim=1)).sum(dim=1).mean()


def barlow(o, t, off_diagonal_weight, weight):
    """Both views' dimensions standardised, then all of their products."""
    o, t = ((x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt() for x in (o, t))
    distance = ((o.T @ t / len(o) - torch.eye(o.shape[1])) ** 2).flatten()
    diagonal = distance[:: o.shape[1] + 1].sum()
    return weight * (diagonal + off_diagonal_weight * (distance.sum() - diagonal))


def vicreg(o, t):
    """25 x invariance + 25 x variance + covariance, the last two of both branches."""
    loss = 25 * ((o - t) ** 2).mean()
    for x in (o, t):
        covariance = x.T.cov()
        variances, others = covariance.diagonal(), 1 - torch.eye(x.shape[1])
        loss = loss + 25 * (1 - (variances + 1e-4).sqrt()).clamp(min=0).mean()
        loss = loss + (others * covariance**2).sum() / x.shape[1]
    return loss


def deepcluster(features, centroids, clusters, tau):
    """-log of the share of each row's centroid, for each head."""
    terms = []
    for own, wanted in zip(centroids, clusters, strict=True):
        shares = (unit(features) @ own.T / tau).log_softmax(dim=1)
        terms.append(-shares[torch.arange(len(wanted)), wanted].mean())
    return sum(terms) / len(terms)


def nn(t, bank):
    """Each row's nearest entry of the bank, as long as the row: NNCLR's NN(z, Q)."""
    nearest = bank[(unit(t) @ unit(bank).T).argmax(dim=1)]
    return unit(nearest) * t.norm(dim=1, keepdim=True)


def projections(model, views):
    net = model.online
    return [net.projector(net.backbone(v)) for v in views]


def online(model, views):
    """Projections and predictions of both views."""
    z = projections(model, views)
    return z, [model.online.predictor(x) for x in z]


def ema_projections(model, views):
    with torch.no_grad():
        return [model.ema.projector(model.ema.backbone(v)) for v in views]


def move_ema(model):
    """Something for the EMA network to differ in."""
    with torch.no_grad():
        for parameter in model.ema.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def gradients(model, loss):
    parameters = list(model.online.parameters())
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def assert_same_gradients(ours, expected):
    largest = max(float(g.abs().max()) for g in expected if g is not None)
    assert largest > 0
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * largest)


def assert_same(model, twin, loss, expected):
    """Equal losses with equal gradients."""
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(gradients(model, loss), gradients(twin, expected))


def compare(model, views, generator):
    """What turns projections into the loss of a whole batch."""
    random = RowRandom.whole(generator, len(views[0]))
    t, ids = model.ema_projections(views), torch.arange(len(views[0]), device=views[0].device)
    return partial(model.compare, t=t, random=random, progress=1.0, sample_ids=ids)


def step(model, views, seed=0, number=0):
    """The output of one step on a whole batch."""
    return model.online(views, compare(model, views, fa_generator(seed, number, views[0].device)))


def enter(model, keys):
    """Let keys enter what an objective keeps; they are of samples 0, 1, ..."""
    if model.memory is not None:
        ids = torch.arange(keys.shape[1], device=keys.device)
        model.objective.after_update(model.memory, keys, ids)
        model.start_epoch(torch.Generator().manual_seed(0))


# --- any cell: the table of docs/method.md. Features come as lists: one, or N augmented ones

FORMULAS = {
    "basic": lambda z_a, t_b, q, A: ([z_a], A(t_b)),
    "basic-online": lambda z_a, t_b, q, A: (A(z_a), [t_b]),
    "pre": lambda z_a, t_b, q, A: ([q(x) for x in A(z_a)], [t_b]),
    "post": lambda z_a, t_b, q, A: (A(q(z_a)), [t_b]),
    "parallel": lambda z_a, t_b, q, A: ([q(z_a)], A(t_b)),
}
A_TAKES_THE_TARGET = ("basic", "parallel")


def options_of(formula):
    """The config's words for a formula."""
    side = "online" if formula == "basic-online" else "auto"
    return {"architecture": formula.removesuffix("-online"), "side": side}


def targets(model, views, z, stops=None):
    """The target branch: the EMA network's, or z with or without its gradient."""
    if model.ema is not None:
        return ema_projections(model, views[:2])
    stops = model.objective.name in ("simsiam", "swav", "deepclusterv2") if stops is None else stops
    return [x.detach() for x in z] if stops else z


def term(model, features, target, plain_target, view):
    """L(features, target); ``view`` is the target's, 0 or 1."""
    name, tau = model.objective.name, getattr(model.objective, "temperature", None)
    if name == "simclr":
        return anchored_nt_xent(target, features, plain_target, tau)
    if name == "infonce":
        return infonce(target, features, tau)
    if name == "moco":
        queue = model.memory[view]
        return moco(features, target, queue.features[: int(queue.count)], tau)
    if name == "swav":
        return swav(features, target, model.online.prototypes.weight, tau)
    if name == "barlow":
        return barlow(features, target, 0.005, 0.025)
    if name == "vicreg":
        return vicreg(features, target)
    if name == "deepclusterv2":
        kept = dict(model.memory.named_buffers())
        clusters = kept["assignments"][:, : len(features)]
        return deepcluster(features, kept["centroids"], clusters, tau)
    return byol(features, target) if name == "byol" else negative_cosine(features, target)


def loss_of_cell(model, views, formula, seed=0, number=0, stops=None):
    """View 2 predicts view 1 and draws first, then view 1 predicts view 2: their mean; BYOL: sum.

    Small crops, behind the two, predict both (before them): the mean of all pairs, as SwAV has it.
    """
    fa, made = model.fa, {}
    acts_on = {"both": range(len(views)), "first": (0,), "second": (1,)}[fa.views]
    z = projections(model, views)
    t = targets(model, views, z, stops)
    generator = fa_generator(seed, number, views[0].device)
    random = RowRandom.whole(generator, len(views[0]))
    small = range(2, len(views))
    pairs = [*((a, 0) for a in small), (1, 0), *((a, 1) for a in small), (0, 1)]
    if (
        model.objective.name == "deepclusterv2"
    ):  # its targets are those of the sample, not of a view
        pairs = [*((a, 0) for a in small), (1, 0), (0, 1)]
    total = 0
    for a, b in pairs:
        view = b if formula in A_TAKES_THE_TARGET else a

        def augment(x, view=view):  # once for each view that A takes
            if view not in made:
                made[view] = list(model.augmenter(x, x, random, 1.0)) if view in acts_on else [x]
            return made[view]

        online, goals = FORMULAS[formula](z[a], t[b], model.online.predictor, augment)
        terms = [term(model, o, goal, t[b], b) for o in online for goal in goals]
        total += sum(terms) / (1 if fa.feature_loss == "free" else len(terms))
    return total * (2 if model.objective.name == "byol" else 1) / len(pairs)
