"""DeepCluster-v2 (arXiv 2006.09882)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float, Int

from common.errors import at_least, positive, require
from common.lazy import Tensor, functional, nn, torch
from pretrain import collectives as dist
from pretrain.objectives.base import Objective, Pair

NO_CLUSTER = -1  # of a sample that was not seen in the epoch before
CHUNK_BYTES = 64 * 2**20  # of similarities that exist at once


@dataclass(frozen=True)
class DeepClusterV2(Objective):
    """Each view predicts the cluster that its sample's features of the last epoch belong to.

    The first epoch only collects features, its loss is 0.
    """

    architecture: ClassVar = "basic"
    stops_target: ClassVar = True
    target_has_gradient: ClassVar = False
    needs_sample_ids: ClassVar = True
    keeps_targets: ClassVar = True
    two_views_only: ClassVar = ""

    name: Literal["deepclusterv2"] = "deepclusterv2"
    temperature: float = 0.1
    num_prototypes: int = 3000  # clusters of each clustering
    num_heads: int = 3  # clusterings that are predicted, each from another start
    kmeans_iterations: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "objective", "temperature")
        at_least(self, "objective", num_prototypes=1, num_heads=1, kmeans_iterations=1)

    def pairs(self, num_views: int) -> list[tuple[int, int]]:
        """See the base class; each view once, since a sample has one cluster for all views."""
        return [*((small, 0) for small in range(2, num_views)), (1, 0), (0, 1)]

    def make_state(self, dim: int, num_samples: int | None = None) -> nn.Module:
        """Buffers alone, H = ``num_heads``, K = ``num_prototypes``, N samples.

        ``features`` [2, N, d]: of unit length, of both views, the last ones of each sample.
        ``is_new`` [N]: whether they are of this epoch.
        ``assignments`` [H, N]: the clusters. ``centroids`` [H, K, d]: of unit length.

        Raises:
            UserError: If there are fewer samples than clusters.
        """
        require(
            num_samples is None or num_samples >= self.num_prototypes,
            f"objective.num_prototypes={self.num_prototypes}: there are only {num_samples} "
            "samples to cluster; use fewer prototypes",
        )
        state, size = nn.Module(), num_samples or 0
        state.register_buffer("features", torch.zeros(2, size, dim))
        state.register_buffer("is_new", torch.zeros(size, dtype=torch.bool))
        state.register_buffer("assignments", torch.full((self.num_heads, size), NO_CLUSTER))
        shape = (self.num_heads, self.num_prototypes, dim)
        state.register_buffer("centroids", torch.zeros(shape))
        return state

    def loss(self, pair: Pair, state: nn.Module) -> Float[Tensor, ""]:
        """See ``deepclusterv2_loss``."""
        assert pair.sample_ids is not None, "clusters belong to samples"
        kept = dict(state.named_buffers())
        clusters = kept["assignments"][:, pair.sample_ids]
        return deepclusterv2_loss(
            pair.online, kept["centroids"], clusters, temperature=self.temperature
        )

    def after_update(
        self,
        state: nn.Module,
        keys: Float[Tensor, "2 m d"],
        sample_ids: Int[Tensor, " m"] | None = None,
    ) -> None:
        """The features of the batch take the places of their samples' last ones."""
        assert sample_ids is not None, "features belong to samples"
        kept = dict(state.named_buffers())
        # Of a sample that comes twice all rows write its last one, so that all processes agree.
        ids, order = sample_ids.sort(stable=True)
        last = order[torch.searchsorted(ids, sample_ids, right=True) - 1]
        features = functional.normalize(keys[:, last], dim=2)
        kept["features"][:, sample_ids] = features.to(kept["features"].dtype)
        kept["is_new"].index_fill_(0, sample_ids, True)

    def start_epoch(self, state: nn.Module, generator: torch.Generator) -> None:
        """Cluster the features of the epoch before, for each head: of view 1, of view 2, ..."""
        kept = dict(state.named_buffers())
        rows = kept["is_new"].nonzero()[:, 0]
        kept["is_new"].zero_()
        kept["assignments"].fill_(NO_CLUSTER)
        for head in range(self.num_heads if len(rows) else 0):
            centroids, clusters = spherical_kmeans(
                kept["features"][head % 2, rows],
                num_clusters=self.num_prototypes,
                num_iterations=self.kmeans_iterations,
                generator=generator,
            )
            kept["centroids"][head] = centroids
            kept["assignments"][head, rows] = clusters


def spherical_kmeans(
    x: Float[Tensor, "m d"], *, num_clusters: int, num_iterations: int, generator: torch.Generator
) -> tuple[Float[Tensor, "K d"], Int[Tensor, " m"]]:
    """k-means on the unit sphere, by cosine; the work is shared out among the processes.

    It starts from rows at random. In each iteration every row goes to its nearest centroid, and
    every centroid to the mean direction of its rows; one without rows stays.

    Args:
        x: Rows of unit length, the same in all processes.
        num_clusters: K. If there are fewer rows than that, some centroids start as copies.
        num_iterations: At least 1.
        generator: On the CPU, in the same state in all processes.

    Returns:
        The centroids, of unit length, and the nearest one of each row.
    """
    from pretrain.precision import exact_products

    numbers = torch.arange(num_clusters, device=x.device)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    centroids = x[order[numbers % len(x)]]
    own = slice(dist.rank(), None, dist.world_size())
    chunks = x[own].split(max(1, CHUNK_BYTES // (4 * num_clusters)))
    with exact_products(x.device):
        for _ in range(num_iterations):
            sums, counts = torch.zeros_like(centroids), x.new_zeros(num_clusters, 1)
            for chunk in chunks:
                # A product instead of a scattered sum: the same bits each time, on a GPU too.
                is_member = ((chunk @ centroids.T).argmax(dim=1, keepdim=True) == numbers).to(x)
                sums += is_member.T @ chunk
                counts += is_member.sum(dim=0).unsqueeze(1)
            sums, counts = dist.total(sums), dist.total(counts)
            centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
            centroids = functional.normalize(centroids, dim=1)
        clusters = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        clusters[own] = torch.cat([(chunk @ centroids.T).argmax(dim=1) for chunk in chunks])
    return centroids, dist.total(clusters)


def deepclusterv2_loss(
    x: Float[Tensor, "n d"],
    centroids: Float[Tensor, "H K d"],
    clusters: Int[Tensor, "H n"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Cross entropy of cosine similarities to the centroids against the rows' clusters.

    Args:
        x: Features of one view, the local part of the batch.
        centroids: Of unit length, of each head.
        clusters: Of the rows; those of ``NO_CLUSTER`` are left out.
        temperature: Divides the similarities.

    Returns:
        Scalar, nats: the mean over heads and rows with a cluster. With several processes these are
        the rows of all: the mean of the processes' values is that of the whole batch.
    """
    logits = functional.normalize(x, dim=1) @ centroids.transpose(1, 2) / temperature
    total = functional.cross_entropy(
        logits.flatten(0, 1), clusters.flatten(), ignore_index=NO_CLUSTER, reduction="sum"
    )
    count = dist.mean((clusters != NO_CLUSTER).sum().to(total.dtype))
    return total / (count + (count == 0))
