"""How easily nearest-neighbour FA is fooled: queries attacked to lose their own neighbour.

Queries are some pictures of a shard set, the support queue holds the projections of all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from common.errors import UserError, require
from pretrain.config import ArchConfig, FAConfig, HeadConfig
from pretrain.data.loader import eval_loader
from pretrain.data.shards import Samples
from pretrain.evaluation.probe import normalise
from pretrain.features.feature_augmentation import Draw, FeatureAugmenter
from pretrain.features.memory_bank import UNKNOWN, Distance, SupportQueue
from pretrain.features.row_random import RowRandom, fa_generator
from pretrain.model.adversarial import perturb
from pretrain.model.joint_embedding import OnlineNetwork

CONSENSUS_OF = 8
DISTANCES: tuple[Distance, ...] = ("cosine", "truncated")
# Partners are queue entries, so that with the same draws clean and attacked get the same ones.
MITIGATIONS: dict[str, dict[str, Any]] = {
    "identity": {"method": "identity"},
    "nn": {"method": "nn"},
    "nn, truncated distance": {"method": "nn", "nn_distance": "truncated"},
    f"nn, consensus of {CONSENSUS_OF}": {"method": "nn", "top_k": CONSENSUS_OF,
                                         "nn_choice": "consensus"},
    "nn, half strength": {"method": "nn", "strength": 0.5},
    "nn+mixup": {"method": "nn+mixup", "partner": "queue"},
    "nn|mask": {"method": "nn|mask"},
    "mask": {"method": "mask"},
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """A network in eval mode, the pictures it looks at, and what its queue holds.

    Attributes:
        network: Backbone and projector.
        mean, std: Of its normalisation, RGB.
        images: The queries, uint8 [n, 3, s, s].
        query_ids: Which samples they are.
        labels: Their labels, -1 where there is none.
        queue: Projections of all other samples.
    """

    network: OnlineNetwork
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    images: UInt8[Tensor, "n 3 s s"]
    query_ids: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    queue: SupportQueue
    device: torch.device
    batch_size: int

    def batches(self) -> Iterator[slice]:
        """Queries that are looked at together."""
        n = len(self.images)
        return (slice(i, min(i + self.batch_size, n)) for i in range(0, n, self.batch_size))

    def clean(self, part: slice) -> Float[Tensor, "n 3 s s"]:
        """Queries, normalised."""
        return normalise(self.images[part].to(self.device), self.mean, self.std)

    @torch.no_grad()
    def project(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        """Projections z = g(f(x))."""
        return self.network.project(images).float()

    def nearest(self, z: Float[Tensor, "n d"], distance: Distance) -> Int[Tensor, " n"]:
        """Where each row's nearest entry stands in the queue."""
        return self.queue.nearest_indices(z, 1, distance=distance)[:, 0]

    def attack(
        self, images: Tensor, neighbours: Float[Tensor, "n d"], epsilon: float, num_steps: int
    ) -> Tensor:
        """Pictures whose projections point away from the neighbours that the clean ones have."""

        def distance_of(x: Tensor) -> Tensor:
            return -functional.cosine_similarity(self.network.project(x), neighbours).sum()

        return perturb(
            distance_of, images, epsilon=epsilon, num_steps=num_steps, step_size=None,
            pixel_mean=self.mean, pixel_std=self.std,
        )  # fmt: skip

    def shake(self, images: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        """The control: every pixel value moved by epsilon up or down, by chance."""
        sign = torch.randint(0, 2, images.shape, generator=generator).to(images) * 2 - 1
        return perturb(
            lambda x: (x * sign).sum(), images, epsilon=epsilon, num_steps=1, step_size=None,
            pixel_mean=self.mean, pixel_std=self.std,
        )  # fmt: skip


def network_of(state: dict[str, Any], device: torch.device) -> OnlineNetwork:
    """The online network of a checkpoint, in eval mode and without gradients of its parameters.

    Raises:
        UserError: If the checkpoint's config is not one of this version.
    """
    weights, config = state["model"], state["config"]
    prototypes = weights.get("prototypes.weight")
    try:
        network = OnlineNetwork(
            ArchConfig(**config["arch"]),
            HeadConfig(**config["heads"]),
            1.0,
            has_predictor=any(key.startswith("predictor.") for key in weights),
            num_prototypes=0 if prototypes is None else len(prototypes),
        )
        network.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"the checkpoint does not fit this version ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); pretrain again"
        ) from error
    return network.eval().requires_grad_(False).to(device)


def prepare(
    state: dict[str, Any],
    index: Samples,
    *,
    num_queries: int,
    device: torch.device,
    batch_size: int = 64,
) -> Study:
    """Choose evenly spaced queries and fill the queue with everything else.

    Raises:
        UserError: If the shards hold too few samples.
    """
    rest = index.num_samples - num_queries
    require(
        num_queries >= 1 and rest >= CONSENSUS_OF,
        f"{num_queries} queries of {index.num_samples} samples leave {rest} for the queue; at "
        f"least {CONSENSUS_OF} are needed: give fewer queries or more shards",
    )
    network = network_of(state, device)
    mean, std = (tuple(state["preprocessing"][name]) for name in ("mean", "std"))
    data, heads = state["config"]["data"], state["config"]["heads"]
    queue = SupportQueue(rest, heads["output_dim"]).to(device)
    chosen = torch.linspace(0, index.num_samples - 1, num_queries).long()
    is_query = torch.zeros(index.num_samples, dtype=torch.bool)
    is_query[chosen] = True
    queries = []
    for images, labels, ids in eval_loader(index, data["image_size"], batch_size):
        here = is_query[ids]
        queries.append((images[here], ids[here], labels[here]))
        if not bool(here.all()):
            with torch.no_grad():
                z = network.project(normalise(images[~here].to(device), mean, std))
            queue.put(z, ids[~here].to(device), labels[~here].to(device))
    images, ids, labels = (torch.cat(column) for column in zip(*queries, strict=True))
    return Study(network, mean, std, images, ids, labels, queue, device, batch_size)


def augmenters(study: Study) -> dict[str, FeatureAugmenter]:
    """An augmenter for each mitigation, all of them reading the study's queue."""
    dim = study.queue.features.shape[1]
    made = {}
    for name, options in MITIGATIONS.items():
        fa = FAConfig(queue_size=study.queue.size, min_fill=CONSENSUS_OF, **options)
        made[name] = FeatureAugmenter(fa, dim)
        if made[name].queue is not None:
            made[name].queue = study.queue
    return made


@dataclass(frozen=True)
class Attacked:
    """What an attack of one strength did to all queries: one row each."""

    clean_nearest: dict[str, Tensor]  # by distance: positions in the queue
    nearest: dict[str, Tensor]
    cosine: dict[str, Tensor]  # by mitigation: of A(clean) and A(attacked)
    images: Float[Tensor, "n 3 s s"]  # normalised, on the CPU


def look(
    study: Study,
    epsilon: float,
    *,
    num_steps: int,
    seed: int = 0,
    is_control: bool = False,
) -> Attacked:
    """Attack all queries and compare what is found and made of them before and after.

    Args:
        study: Network, queries, queue.
        epsilon: Largest change of a pixel value, in 1/255.
        num_steps: 1: FGSM; more: PGD.
        seed: Of the control's signs and of FA's draws.
        is_control: Random signs instead of an attack.
    """
    made = augmenters(study)
    generator = torch.Generator().manual_seed(seed)
    rows: list[Attacked] = []
    for number, part in enumerate(study.batches()):
        images = study.clean(part)
        z = study.project(images)
        before = {name: study.nearest(z, name) for name in DISTANCES}
        if is_control:
            moved = study.shake(images.cpu(), epsilon, generator).to(images)
        else:
            own = study.queue.features[before["cosine"]].float()
            moved = study.attack(images, own, epsilon, num_steps)
        w = study.project(moved)
        cosine = {}
        for name, augmenter in made.items():
            draws = [_draw(study, augmenter, seed, number, len(z)) for _ in range(2)]
            pair = (augmenter(x, x, draw)[0] for x, draw in zip((z, w), draws, strict=True))
            cosine[name] = functional.cosine_similarity(*pair).cpu()
        after = {name: study.nearest(w, name).cpu() for name in DISTANCES}
        before = {name: positions.cpu() for name, positions in before.items()}
        rows.append(Attacked(before, after, cosine, moved.cpu()))
    return Attacked(
        *({key: torch.cat([getattr(row, field)[key] for row in rows])
           for key in getattr(rows[0], field)} for field in ("clean_nearest", "nearest", "cosine")),
        images=torch.cat([row.images for row in rows]),
    )  # fmt: skip


def _draw(study: Study, augmenter: FeatureAugmenter, seed: int, number: int, n: int) -> Draw:
    """The same numbers each time it is asked for."""
    generator = fa_generator(seed, number, study.device)
    return Draw(RowRandom.whole(generator, n), augmenter.fa.strength)


def summary(study: Study, seen: Attacked) -> dict[str, Any]:
    """The figures of one attack.

    Returns:
        ``neighbour_flip``: by distance, share of queries with another nearest entry than before.
        ``label_flip``: by distance, share whose nearest entry has another label than the one
        before, of the pairs in which both are known; None without such a pair.
        ``neighbour_cosine``: by distance, mean cosine of the entries found before and after.
        ``cosine``: by mitigation, mean over queries of cos( A(clean), A(attacked) ).
        ``cosine_p10``: the same, 10th percentile.
    """
    labels, features = study.queue.labels.cpu(), study.queue.features.cpu().float()
    flip, label_flip, similarity = {}, {}, {}
    for name in DISTANCES:
        before, after = seen.clean_nearest[name], seen.nearest[name]
        flip[name] = float((before != after).double().mean())
        was, now = labels[before], labels[after]
        known = (was != UNKNOWN) & (now != UNKNOWN)
        label_flip[name] = float((was != now)[known].double().mean()) if known.any() else None
        cosine = functional.cosine_similarity(features[before], features[after])
        similarity[name] = float(cosine.mean())
    return {
        "neighbour_flip": flip,
        "label_flip": label_flip,
        "neighbour_cosine": similarity,
        "cosine": {name: float(values.mean()) for name, values in seen.cosine.items()},
        "cosine_p10": {name: float(values.quantile(0.1)) for name, values in seen.cosine.items()},
    }
