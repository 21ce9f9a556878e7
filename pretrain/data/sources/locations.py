"""What a user may name as one source of shards: a folder or a pattern of tars, here or on a server.

docs/shards.md lists the forms. A source is a folder (`/data/shards`, `s3://bucket/shards/`) or a
row of tars: one tar, braces (`train-{000..099}.tar`), a glob, or `pipe:` commands.
"""

import glob
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from braceexpand import braceexpand

from common.errors import UserError, require
from pretrain.data.index import parse_index
from pretrain.data.sources.remote import Patience, displayed, find_tars, read_if_there

SCHEMES = ("file", "http", "https", "s3", "gs", "pipe")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?=//)|(pipe):")
_BRACES = re.compile(r"\{[^{}]*(,|\.\.)[^{}]*\}")
_GLOB = re.compile(r"[*?\[]")
_COMPRESSED = re.compile(r"\.(tgz|tar\.[a-z0-9]+)$")
_MAX_SHARDS = 1_000_000


@dataclass(frozen=True)
class Location:
    """One source of shards, as a user named it.

    Attributes:
        scheme: "file", "http", "https", "s3", "gs" or "pipe".
        is_folder: True for a folder, false for a row of tars.
        text: Path without ``file://``, URL, or ``pipe:`` with its command; braces not yet expanded.
    """

    scheme: str
    is_folder: bool
    text: str

    @property
    def is_remote(self) -> bool:
        """True if its tars must be fetched."""
        return self.scheme != "file"


def parse(spec: str | Path) -> Location:
    """Tell what a user named; looks at the local disk only.

    Raises:
        UserError: If the scheme is unknown, or the form is impossible.
    """
    text = str(spec)
    match = _SCHEME.match(text)
    if match is None:
        return _parse_local(text)
    scheme = (match[1] or match[2]).lower()
    if scheme not in SCHEMES:
        raise UserError(
            f"{text}: shards behind {scheme}:// cannot be read; possible are a local path, "
            + ", ".join(f"{name}://" for name in SCHEMES[:-1])
            + " and pipe:COMMAND"
        )
    if scheme == "pipe":
        if not text[5:].strip():
            raise UserError(f"{text}: pipe: needs a command that writes a tar to its output")
        return Location("pipe", False, text)
    parts = urlsplit(text)
    if scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise UserError(f"{text}: a local file is file:///PATH, with three slashes")
        return _parse_local(unquote(text.split("://", 1)[1].removeprefix("localhost")))
    return _parse_remote(text, scheme)


def _parse_local(path: str) -> Location:
    if Path(path).is_dir():
        return Location("file", True, path)
    is_pattern = _BRACES.search(path) or _GLOB.search(path) or path.endswith(".tar")
    if not is_pattern and not _COMPRESSED.search(path):
        return Location("file", True, path)  # missing: whoever opens it says so
    _require_tar(path, path)
    return Location("file", False, path)


def _parse_remote(text: str, scheme: str) -> Location:
    url = scheme + text[len(scheme) :]
    is_web = scheme in ("http", "https")
    rest = url.split("://", 1)[1]
    host, path = (re.sub(r"[?#].*", "", rest) if is_web else rest).partition("/")[::2]
    if not host:
        raise UserError(f"{text}: names no {'server' if is_web else 'bucket'}")
    if is_web and "*" in path:
        raise UserError(
            f"{displayed(text)}: a web server cannot be searched; name the tars with braces, as in "
            "train-{000000..000099}.tar"
        )
    is_folder = not path.endswith(".tar") and not _COMPRESSED.search(path)
    if is_folder and (_BRACES.search(path) or (not is_web and _GLOB.search(path))):
        raise UserError(
            f"{displayed(text)}: braces and globs name tars, not folders; end it with .tar, or "
            "name several sources"
        )
    if not is_folder:
        _require_tar(path, displayed(text))
    return Location(scheme, is_folder, url)


def _require_tar(path: str, name: str) -> None:
    if _COMPRESSED.search(path):
        raise UserError(
            f"{name}: compressed tars have no random access; unpack them first (gunzip, zstd -d)"
        )
    if not path.endswith(".tar"):
        raise UserError(f"{name}: a pattern must name .tar files; end it with .tar")


def expand(spec: str | Path, patience: Patience | None = None) -> list[str]:
    """The tars of a source: local paths, URLs, or ``pipe:`` commands, in their order.

    Args:
        spec: What the user named.
        patience: How long to try where a server must list (folders and globs).
    Returns:
        At least one; no two are the same. Local paths are not checked to exist unless a glob or a
        folder names them.
    Raises:
        UserError: If nothing fits, or a server cannot list.
    """
    location = parse(spec)
    patience = patience or Patience()
    if location.is_folder:
        url = join(location.text, "index.json")
        if location.is_remote:
            data = read_if_there(url, patience)
        else:
            data = Path(url).read_bytes() if Path(url).exists() else None
        if data is None:
            return list_tars(location, patience)
        names = [shard["name"] for shard in parse_index(data, displayed(url))["shards"]]
        return [join(location.text, name) for name in names]
    texts = [location.text]
    if _BRACES.search(location.text) and not Path(location.text).exists():
        try:
            texts = list(itertools.islice(braceexpand(location.text), _MAX_SHARDS + 1))
        except ValueError:
            raise UserError(
                f"{displayed(location.text)}: a brace is not closed; write \\{{ for one that "
                "stands for itself"
            ) from None
        require(
            len(texts) <= _MAX_SHARDS,
            f"{displayed(location.text)}: the braces name more than {_MAX_SHARDS:,} shards",
        )
    tars: list[str] = []
    for text in texts:
        named = [text]
        if _GLOB.search(text) and location.scheme in ("s3", "gs"):
            named = find_tars(text, patience)
        elif _GLOB.search(text) and location.scheme == "file" and not Path(text).exists():
            named = sorted(glob.glob(text))
        require(bool(named), f"{text}: no file fits this pattern; check the folder and the name")
        tars += named
    if len(set(tars)) < len(tars):
        twice = next(tar for tar, group in itertools.groupby(sorted(tars)) if len(list(group)) > 1)
        raise UserError(f"{displayed(location.text)}: names {displayed(twice)} more than once")
    return tars


def join(folder: str, name: str) -> str:
    """Path or URL of a file in a folder; a query of the folder's URL (a token, say) is kept."""
    if urlsplit(folder).scheme not in ("http", "https"):
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(folder)
    path = f"{parts.path.rstrip('/')}/{quote(name)}"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def list_tars(location: Location, patience: Patience) -> list[str]:
    """All tars of a folder that has no index.json.

    Raises:
        UserError: If the folder is missing, holds no tar, or cannot be listed.
    """
    text = displayed(location.text)
    remedy = "check the address"
    if not location.is_remote:
        folder = Path(location.text)
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder of shards; make one with tools/make_shards.py"
            )
        tars = sorted(str(path) for path in folder.glob("*.tar"))
        remedy = f"make shards with tools/make_shards.py SOURCE {folder}"
    elif location.scheme in ("http", "https"):
        raise UserError(
            f"{text}: there is no index.json, and a web server cannot be searched; name the tars "
            "with braces, as in train-{000000..000099}.tar"
        )
    else:
        tars = find_tars(join(location.text, "*.tar"), patience)
    if not tars:
        raise UserError(f"{text}: holds neither index.json nor .tar files; {remedy}")
    return tars
