"""Features of pictures in files, folders and shards, upright, in their order."""

import json
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError, printable, require
from common.files import write_atomically, write_json
from common.picture_files import find_files, in_threads
from common.pictures import BadPicture, decode, is_picture_file, read_file
from pretrain.data.decode import center_crop
from pretrain.data.shards import ShardIndex
from pretrain.evaluation import duplicates
from pretrain.evaluation.duplicates import Fingerprint
from pretrain.evaluation.linear.features import FrozenBackbone
from pretrain.evaluation.pictures import save_grid, tile_of
from pretrain.features.memory_bank import top_k

FORMAT = "fa-embeddings-1"


class NamedPicture(NamedTuple):
    """A picture that is not read yet.

    Attributes:
        name: Its path, or SHARDS/KEY; what a terminal cannot print is escaped.
        read: Gives its bytes; raises BadPicture, or UserError where a shard has changed.
    """

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class PictureList:
    """What was named.

    Attributes:
        pictures: In order.
        bad: Messages about samples of tars that hold no picture.
        num_others: Files of other kinds below folders.
    """

    pictures: list[NamedPicture]
    bad: list[str]
    num_others: int


def list_pictures(given: Sequence[str], out: Path) -> PictureList:
    """Find pictures; no picture is decoded.

    Args:
        given: Files, folders, globs; tars, folders of tars, patterns and URLs of tars, which come
            after the others.
        out: What will be written, which is none of them.

    Raises:
        UserError: If one is missing, or nothing is found.
    """
    found: dict[str, NamedPicture] = {}
    bad, num_others = [], 0
    shards = [text for text in given if _is_shards(text)]
    files = [text for text in given if text not in shards]
    for file in find_files(files, out) if files else ():
        if file.is_named or is_picture_file(file.path):
            name = printable(str(file.path))
            found[name] = NamedPicture(name, partial(read_file, file.path))
        else:
            num_others += 1
    for text in dict.fromkeys(shards):
        index, lock = ShardIndex.open(text), threading.Lock()
        bad += [f"{index.name}: {one['file']}: {one['reason']}" for one in index.left_out]
        for i in range(index.num_samples):
            name = printable(f"{index.name.rstrip('/')}/{index.key_name(i)}")
            # The same key may stand in two tars of another tool.
            name = f"{name} ({printable(index.describe(i))})" if name in found else name
            found[name] = NamedPicture(name, partial(_read_sample, index, lock, i))
    require(
        bool(found),
        f"{', '.join(given)}: no picture among {num_others} files; give pictures, folders that "
        "hold some, or shards",
    )
    return PictureList(list(found.values()), bad, num_others)


def _is_shards(text: str) -> bool:
    """Whether a text names tars: by its form, or a folder by what is directly in it."""
    folder = Path(text)
    if not folder.is_dir():
        return "://" in text or text.endswith(".tar") or text.startswith("pipe:")
    if (folder / "index.json").is_file() and (folder / "samples.npy").is_file():
        return True
    if not any(folder.glob("*.tar")):
        return False
    picture = next((p for p in folder.iterdir() if p.is_file() and is_picture_file(p)), None)
    require(
        picture is None,
        f"{text}: holds tars and pictures; name the tars as {text}/*.tar in quotes, or the "
        "pictures in a folder of their own",
    )
    return True


def _read_sample(index: ShardIndex, lock: threading.Lock, i: int) -> bytes:
    with lock:
        return index.read_bytes(i)


class Embeddings(NamedTuple):
    """Pictures that decoded, and their features.

    Attributes:
        features: float32 [n, d].
        pictures: n of them.
        prints: Fingerprints of the pictures, if they were wanted.
        bad: Messages about those that did not decode.
    """

    features: np.ndarray
    pictures: list[NamedPicture]
    prints: list[Fingerprint]
    bad: list[str]


def embed(
    backbone: FrozenBackbone,
    pictures: PictureList,
    *,
    batch_size: int,
    num_threads: int,
    max_bad: int,
    with_prints: bool = False,
) -> Embeddings:
    """Compute the features of pictures, with a progress bar; bad ones are named on stderr.

    Args:
        backbone: The network and how it looks at pictures.
        pictures: From `list_pictures`.
        batch_size: Pictures per forward pass.
        num_threads: That decode.
        max_bad: How many pictures may be bad.
        with_prints: Whether fingerprints are made, too.

    Raises:
        UserError: If more pictures are bad, none is good, a shard has changed, or a feature is not
            finite.
    """
    size = backbone.view["image_size"]

    def prepare(picture: NamedPicture) -> tuple[np.ndarray, Fingerprint | None] | BadPicture:
        try:
            pixels = decode(picture.read(), where=picture.name)
        except BadPicture as error:
            return error
        fingerprint = Fingerprint.of(pixels) if with_prints else None
        return center_crop(pixels, size), fingerprint

    def count_bad(message: str) -> None:
        bad.append(printable(message))
        tqdm.write(f"bad picture: {bad[-1]}", file=sys.stderr)
        require(
            len(bad) <= max_bad,
            f"{len(bad)} bad pictures, more than --max-bad {max_bad}: repair or remove them, or "
            "leave out up to N with --max-bad N",
        )

    def compute() -> None:
        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        computed = backbone(images).cpu().numpy()
        names = f"{good[-len(crops)].name} to {good[-1].name}"
        require(
            bool(np.isfinite(computed).all()),
            f"features of {names} are not finite: the weights are damaged",
        )
        features[len(good) - len(crops) : len(good)] = computed
        crops.clear()

    num = len(pictures.pictures)
    features = np.empty((num, backbone.model.output_dim), np.float32)
    good, prints, bad = list[NamedPicture](), list[Fingerprint](), list[str]()
    crops = list[np.ndarray]()
    for message in pictures.bad:
        count_bad(message)
    with tqdm(total=num, desc="features", unit=" pictures", disable=None) as bar:
        prepared = in_threads(prepare, pictures.pictures, num_threads)
        for picture, one in zip(pictures.pictures, prepared, strict=True):
            if isinstance(one, BadPicture):
                count_bad(str(one))
            else:
                good.append(picture)
                crops.append(one[0])
                prints += [one[1]] if one[1] is not None else []
                if len(crops) == batch_size:
                    compute()
            bar.update()
        if crops:
            compute()
    if not good:
        raise UserError(f"all {num} pictures are bad; see the messages above")
    return Embeddings(features[: len(good)], good, prints, bad)


def save(path: Path, embeddings: Embeddings, backbone: FrozenBackbone) -> None:
    """Write a .npz that `numpy.load` reads without pickle, whole or not at all.

    ``features`` float32 [n, d], ``names`` unicode [n], and as texts ``format``, ``model``,
    ``model_sha256`` (of the file; empty for random weights), ``weights_hash`` (of the tensors) and
    ``preprocessing`` (JSON).
    """
    about = backbone.description
    arrays = {
        "features": embeddings.features,
        "names": np.array([picture.name for picture in embeddings.pictures], np.str_),
        "format": np.array(FORMAT),
        "model": np.array(printable(about["name"])),
        "model_sha256": np.array(about["file_sha256"] or ""),
        "weights_hash": np.array(about["weights_hash"]),
        "preprocessing": np.array(json.dumps(backbone.view)),
    }
    write_atomically(path, lambda file: np.savez(file, **arrays))


def save_neighbours(
    path: Path, embeddings: Embeddings, *, num_queries: int, num_neighbours: int, seed: int
) -> None:
    """A sheet: pictures in rows, each with its nearest ones and their cosine, and a JSON beside it.

    Args:
        path: Of the JPEG.
        embeddings: Queries are drawn from them.
        num_queries: Rows, at most.
        num_neighbours: In a row, at most.
        seed: Of the choice.

    Raises:
        UserError: If there is one picture only.
    """
    pictures = embeddings.pictures
    require(len(pictures) > 1, "--neighbours: one picture has no neighbour; give more")
    drawn = np.random.default_rng(seed).choice(
        len(pictures), min(num_queries, len(pictures)), replace=False
    )
    features, queries = torch.from_numpy(embeddings.features), torch.from_numpy(np.sort(drawn))
    values, nearest = top_k(
        features[queries], features, min(num_neighbours, len(pictures) - 1), is_unit=False,
        excluded=queries,
    )  # fmt: skip
    rows, captions, described = [], [], []
    for query, found, cosines in zip(
        queries.tolist(), nearest.tolist(), values.tolist(), strict=True
    ):
        rows.append([tile_of(pictures[i].read) for i in (query, *found)])
        captions.append(["query", *(f"{cosine:.3f}" for cosine in cosines)])
        described.append({
            "query": pictures[query].name,
            "neighbours": [pictures[i].name for i in found],
            "cosines": [round(cosine, 4) for cosine in cosines],
        })  # fmt: skip
    save_grid(path, rows, {"num_pictures": len(pictures), "rows": described}, captions)


def save_duplicates(path: Path, embeddings: Embeddings, threshold: float | None) -> dict[str, Any]:
    """Write the groups of duplicates, largest first, with the rule by which they were found.

    Args:
        path: Of the JSON.
        embeddings: With fingerprints.
        threshold: Lowest correlation of near duplicates; None: the default.

    Returns:
        What was written; "cosines" and "correlations" are those with the group's first picture.
    """
    threshold = duplicates.THRESHOLD if threshold is None else threshold
    groups = []
    for group in duplicates.find_groups(embeddings.prints, threshold):
        rows = embeddings.features[group.members].astype(np.float64)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        groups.append({
            "kind": group.kind,
            "pictures": [embeddings.pictures[i].name for i in group.members],
            "correlations": group.correlations,
            "cosines": [round(float(cosine), 4) for cosine in rows @ rows[0]],
        })  # fmt: skip
    report = {
        "format": "fa-duplicates-1",
        "rule": {"threshold": threshold, "thumbnails": [duplicates.COARSE, duplicates.SIDE],
                 "mirrored": True, "colour": False, "min_contrast": duplicates.MIN_CONTRAST},
        "num_compared": len(embeddings.pictures),
        "num_groups": len(groups),
        "num_pictures": sum(len(group["pictures"]) for group in groups),
        "groups": groups,
    }  # fmt: skip
    write_json(path, report)
    return report
