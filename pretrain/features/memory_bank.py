"""The support queue: past features among which nearest neighbours are searched."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

Distance = Literal["cosine", "truncated"]

SEARCH_BYTES = 64 * 2**20  # of similarities, or of differences, that exist at once
CAST_BYTES = 8 * 2**20  # of a half-precision bank that is turned into fp32 at once
MIN_SHORTLIST = 64
SHORTLIST_PER_NEIGHBOUR = 4


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in fp32: neither autocast nor TF32."""
    before = torch.get_float32_matmul_precision()
    is_rounded = before != "highest"  # setting what is set would make torch.compile start anew
    if is_rounded:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if is_rounded:
            torch.set_float32_matmul_precision(before)


@torch.no_grad()
def top_k(
    z: Float[Tensor, "n d"],
    bank: Float[Tensor, "m d"],
    k: int,
    *,
    distance: Distance = "cosine",
    truncation: float = 2.0,
    shortlist: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k entries nearest to each row, nearest first.

    ``cosine``: similarity cos(z, b). ``truncated``: a distance in which no single dimension counts
    for more than c^2, c = truncation / sqrt(d), however far apart the vectors are there:

        D(z, b) = sum over dimensions of min((z_d - b_d)^2, c^2),   similarity 1 - D / 2,

    of vectors of unit length; where nothing is truncated, this is the cosine again. It is computed
    for the nearest by cosine only: exact within the shortlist, blind to what lies outside it.

    Args:
        z: Queries of any length.
        bank: Entries of unit length, in fp32, fp16 or bf16.
        k: Neighbours for each query.
        distance: What "nearest" means.
        truncation: In units of 1 / sqrt(d), the typical size of a component.
        shortlist: Entries that ``truncated`` ranks; 4 k, and 64 at least, unless given.
        chunk_rows: Queries that are compared at once, at most; unless given, as many as keep the
            similarities within ``SEARCH_BYTES``. The result does not depend on it, but for the
            rounding of a matrix product of a few rows.
    Returns:
        Similarities in fp32, in [-1, 1] but for rounding, and positions in the bank.
    Raises:
        ValueError: If the bank holds fewer than k entries, or an argument is out of its range.
    """
    num_entries, dim = bank.shape
    if k > num_entries:
        raise ValueError(f"asked for the {k} nearest of {num_entries} valid entries")
    if min(k, 1 if chunk_rows is None else chunk_rows) < 1:
        raise ValueError(f"k and chunk_rows must be at least 1, got {k} and {chunk_rows}")
    num_ranked = k
    if distance == "truncated":
        num_ranked = _shortlist_length(k, num_entries, shortlist)
        if not truncation > 0:
            raise ValueError(f"truncation must be positive, got {truncation}")
    elif distance != "cosine":
        raise ValueError(f"distance must be 'cosine' or 'truncated', got {distance!r}")
    width = num_entries if distance == "cosine" else max(num_entries, num_ranked * dim)
    most = chunk_rows or max(1, SEARCH_BYTES // (4 * width))
    found = []
    with exact_products(z.device):
        z = functional.normalize(z.detach().float(), dim=1)
        for rows in z.split(_even_length(len(z), most)):
            similarity, indices = _by_cosine(rows, bank, num_ranked)
            if distance == "truncated":
                similarity = _truncated_similarity(rows, bank, indices, truncation / math.sqrt(dim))
                similarity, order = similarity.topk(k, dim=1)
                indices = indices.gather(1, order)
            found.append((similarity, indices))
    similarities, positions = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(positions)


@torch.no_grad()
def consensus(
    neighbours: Float[Tensor, "n k d"], z: Float[Tensor, "n d"], *, temperature: float = 0.1
) -> Float[Tensor, "n d"]:
    """A robust centre of each row's k neighbours: one that is unlike the others hardly counts.

    With b_1 .. b_k of unit length,

        m_i = median over j != i of b_i . b_j,   w = softmax(m / temperature),
        centre = sum_i w_i b_i, normalised.

    The median of an even number of values is the mean of the two in the middle. Two neighbours
    weigh the same; of one, the centre is itself. If the sum has no direction, as with two
    opposite neighbours, the neighbour most similar to z takes its place; z has no other part.

    Args:
        neighbours: Of any length; they are normalised here.
        z: The queries.
        temperature: Of the weights; at infinity the centre is the plain mean.
    Returns:
        Centres of unit length in fp32.
    Raises:
        ValueError: If there is no neighbour, or the temperature is not positive.
    """
    k = neighbours.shape[1]
    if k < 1 or not temperature > 0:
        raise ValueError(
            f"a consensus needs neighbours and a positive temperature, got k={k} and {temperature}"
        )
    with exact_products(z.device):
        neighbours = functional.normalize(neighbours.detach().float(), dim=2)
        if k == 1:
            return neighbours[:, 0]
        weights = (_median_of_others(neighbours) / temperature).softmax(dim=1)
        centre = (weights.unsqueeze(2) * neighbours).sum(dim=1)
        length = centre.norm(dim=1, keepdim=True)
        closest = (neighbours * z.detach().float().unsqueeze(1)).sum(dim=2).argmax(dim=1)
        fallback = neighbours[torch.arange(len(z), device=z.device), closest]
        return torch.where(length > 1e-6, functional.normalize(centre, dim=1), fallback)


def _by_cosine(
    z: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k entries of the largest inner product; a bank in fp32 is multiplied in one piece."""
    num_entries, dim = bank.shape
    step = num_entries if bank.dtype == torch.float32 else max(1, CAST_BYTES // (4 * dim))
    similarity = z.new_empty(len(z), num_entries)
    for start in range(0, num_entries, step):
        part = bank[start : start + step].float()
        torch.mm(z, part.T, out=similarity[:, start : start + step])
    values, indices = similarity.topk(k, dim=1)
    return values, indices


def _truncated_similarity(
    z: Float[Tensor, "n d"], bank: Float[Tensor, "m d"], indices: Int[Tensor, "n s"], limit: float
) -> Float[Tensor, "n s"]:
    """1 - D / 2 with D truncated at limit^2 per dimension; in place, on one block [n, s, d]."""
    difference = bank[indices].float().sub_(z.unsqueeze(1))
    return 1 - difference.clamp_(-limit, limit).square_().sum(dim=2) / 2


def _median_of_others(unit: Float[Tensor, "n k d"]) -> Float[Tensor, "n k"]:
    """Median similarity of each of k > 1 vectors to the k - 1 others."""
    num_others = unit.shape[1] - 1
    similarity = unit @ unit.transpose(1, 2)
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # sorted behind the others
    ranked = similarity.sort(dim=2, descending=True).values
    return (ranked[..., (num_others - 1) // 2] + ranked[..., num_others // 2]) / 2


def _shortlist_length(k: int, num_entries: int, wanted: int | None) -> int:
    length = max(MIN_SHORTLIST, SHORTLIST_PER_NEIGHBOUR * k) if wanted is None else wanted
    if length < k:
        raise ValueError(f"a shortlist of {length} cannot hold the {k} nearest")
    return min(length, num_entries)


def _even_length(num_rows: int, most: int) -> int:
    """Rows of a chunk: as few chunks of at most ``most`` as can be, all about as long."""
    return max(1, math.ceil(num_rows / math.ceil(max(1, num_rows) / most)))


UNKNOWN = -1  # sample id or label of an entry that came without one


class SupportQueue(nn.Module):
    """A ring buffer of normalised features with a valid count.

    It starts empty: nothing is searched that was not put in. Any batch fits any size. The buffers
    are in ``state_dict`` and so in the checkpoint. Under several processes each puts the same
    global batch, so the queues stay equal; the queue lives outside the module that DDP wraps, so
    that no buffer broadcast touches it.

    Beside each entry stand the sample it was computed from, its label and the number of the put
    that brought it (from 1; 0 where nothing was put yet). They are only looked at by ``report``:
    no search depends on them.

    ``count`` says how many entries are valid and is saved; ``num_entries`` is the same number where
    the host knows it without asking the device.

    Args:
        size: Entries.
        dim: Width of a feature.
        dtype: What features are stored in. Half precision halves the memory and moves a stored
            feature's similarities by 2^-8 (bfloat16) or 2^-11 (float16) at most; they are
            normalised before they are rounded, and the search multiplies in fp32 on every device.
    """

    features: Tensor
    position: Tensor
    count: Tensor
    sample_ids: Tensor
    labels: Tensor
    born: Tensor
    puts: Tensor

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a support queue needs at least one entry, got size={size}")
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"a support queue stores float32, float16 or bfloat16, got {dtype}")
        self.size = size
        self.register_buffer("features", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sample_ids", torch.full((size,), UNKNOWN))
        self.register_buffer("labels", torch.full((size,), UNKNOWN))
        self.register_buffer("born", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("puts", torch.zeros((), dtype=torch.int64))
        self.num_entries = 0
        self.register_load_state_dict_pre_hook(_refuse_another_dtype)
        self.register_load_state_dict_post_hook(_read_count)

    @torch.no_grad()
    def put(
        self,
        features: Float[Tensor, "n d"],
        sample_ids: Int[Tensor, " n"] | None = None,
        labels: Int[Tensor, " n"] | None = None,
    ) -> None:
        """Append rows, normalised; the oldest fall out. Of more than ``size`` the last stay.

        Args:
            features: Of any length and precision.
            sample_ids: Which sample each row was computed from; -1, or None for all, if unknown.
            labels: Class of each row's sample; -1, or None for all, if it has none.
        Raises:
            ValueError: If there is not one id, or not one label, for each row.
        """
        num_rows = len(features)
        notes = [(self.sample_ids, sample_ids, "sample ids"), (self.labels, labels, "labels")]
        for _, values, name in notes:
            if values is not None and values.shape != (num_rows,):
                raise ValueError(f"got {name} {list(values.shape)} for {num_rows} rows")
        features = functional.normalize(features.detach().float(), dim=1)[-self.size :]
        n = features.shape[0]
        slots = (self.position + torch.arange(n, device=features.device)) % self.size
        unknown = self.count.new_full((), UNKNOWN)
        self.puts.add_(1)
        self.features[slots] = features.to(self.features.dtype)
        self.born[slots] = self.puts
        for column, values, _ in notes:
            column[slots] = unknown if values is None else values.to(column)[-self.size :]
        self.position.copy_((self.position + n) % self.size)
        self.num_entries = min(self.num_entries + n, self.size)
        self.count.fill_(self.num_entries)

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "n d"], k: int) -> Float[Tensor, "n k d"]:
        """The k entries of highest cosine similarity to each row, in fp32, nearest first.

        Raises:
            ValueError: If fewer than k entries are valid.
        """
        return self.features[self.nearest_indices(z, k)].float()

    def nearest_indices(
        self,
        z: Float[Tensor, "n d"],
        k: int,
        *,
        distance: Distance = "cosine",
        truncation: float = 2.0,
    ) -> Int[Tensor, "n k"]:
        """Positions of the k nearest entries in the buffer, nearest first; see ``top_k``.

        Raises:
            ValueError: If fewer than k entries are valid.
        """
        valid = self.features[: self.num_entries]
        return top_k(z, valid, k, distance=distance, truncation=truncation)[1]

    @torch.no_grad()
    def report(
        self,
        indices: Int[Tensor, " n"],
        sample_ids: Int[Tensor, " n"] | None = None,
        labels: Int[Tensor, " n"] | None = None,
    ) -> dict[str, float]:
        """Figures on the neighbours that were found; to be asked before the next ``put``.

        Args:
            indices: One neighbour for each row: its position in the buffer.
            sample_ids: The rows' own samples; -1 or None: unknown.
            labels: The rows' own labels; -1 or None: none.
        Returns:
            ``neighbour_age``: mean number of puts ago, 1 for the last.
            ``self_hit_rate``: share of neighbours that show the row's own sample.
            ``neighbour_label_agreement``: share of neighbours with the row's label.
            Shares are of the pairs in which both sides are known; without any, or without rows,
            the key is absent.
        """
        if not len(indices):
            return {}
        figures = {"neighbour_age": float((self.puts - self.born[indices] + 1).double().mean())}
        for key, column, values in (
            ("self_hit_rate", self.sample_ids, sample_ids),
            ("neighbour_label_agreement", self.labels, labels),
        ):
            if values is not None:
                share = _share_of_equals(column[indices], values.to(column))
                figures |= {} if share is None else {key: share}
        return figures


def _share_of_equals(first: Int[Tensor, " n"], second: Int[Tensor, " n"]) -> float | None:
    """Share of equal values among the pairs that are known; None without such a pair."""
    known = (first != UNKNOWN) & (second != UNKNOWN)
    num_known, num_equal = int(known.sum()), int((known & (first == second)).sum())
    return num_equal / num_known if num_known else None


def _refuse_another_dtype(
    module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool,
    _missing: list[str], _unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Torch would round the features silently; another size it refuses by itself."""
    stored = state.get(f"{prefix}features")
    wanted = module.get_buffer("features").dtype
    if stored is not None and stored.dtype != wanted:
        errors.append(
            f"the support queue was saved in {stored.dtype} and is {wanted} here: keep its "
            "precision, or start without the saved queue"
        )


def _read_count(module: nn.Module, _incompatible: Any) -> None:
    """After loading: the one time that the device is asked."""
    assert isinstance(module, SupportQueue)
    module.num_entries = int(module.count)
