"""What a user may name as one source of shards: a folder or a pattern of tars, here or on a server.

docs/sources.md lists the forms. A source is a folder (`/data/shards`, `s3://bucket/shards/`) or a
row of tars: one tar, braces (`train-{000..099}.tar`), a glob, or `pipe:` commands.
"""

import glob
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from braceexpand import braceexpand

from common.errors import UserError
from pretrain.data.sources.remote import Patience, find_tars, read_if_there, shown

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
    is_pattern = _has_braces(path) or _GLOB.search(path) or path.endswith(".tar")
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
            f"{shown(text)}: a web server cannot be searched; name the tars with braces, as in "
            "train-{000000..000099}.tar"
        )
    is_folder = not path.endswith(".tar") and not _COMPRESSED.search(path)
    if is_folder and (_has_braces(path) or (not is_web and _GLOB.search(path))):
        raise UserError(
            f"{shown(text)}: braces and globs name tars, not folders; end it with .tar, or name "
            "several sources"
        )
    if not is_folder:
        _require_tar(path, shown(text))
    return Location(scheme, is_folder, url)


def _require_tar(path: str, name: str) -> None:
    if _COMPRESSED.search(path):
        raise UserError(
            f"{name}: compressed tars have no random access; unpack them first (gunzip, zstd -d)"
        )
    if not path.endswith(".tar"):
        raise UserError(f"{name}: a pattern must name .tar files; end it with .tar")


def _has_braces(text: str) -> bool:
    return _BRACES.search(text) is not None


def expand(spec: str | Path, patience: Patience | None = None) -> list[str]:
    """The tars of a source: local paths, URLs, or ``pipe:`` commands, in their order.

    Args:
        spec: What the user named.
        patience: How long to try where a server must be asked (folders and globs).
    Returns:
        At least one; no two are the same. Local paths are not checked to exist unless a glob or a
        folder names them.
    Raises:
        UserError: If nothing fits, or a server cannot be asked.
    """
    location = parse(spec)
    patience = patience or Patience()
    if location.is_folder:
        return list_folder(location, patience)
    tars: list[str] = []
    for text in _expand_braces(location.text):
        tars += _expand_glob(text, location.scheme, patience)
    if len(set(tars)) < len(tars):
        twice = next(tar for tar, group in itertools.groupby(sorted(tars)) if len(list(group)) > 1)
        raise UserError(f"{shown(location.text)}: names {shown(twice)} more than once")
    return tars


def _expand_braces(text: str) -> list[str]:
    if Path(text).exists() or not _has_braces(text):
        return [text]  # braces that stand for themselves, as in an awk program
    try:
        found = list(itertools.islice(braceexpand(text), _MAX_SHARDS + 1))
    except ValueError:
        raise UserError(
            f"{shown(text)}: a brace is not closed; write \\{{ for one that stands for itself"
        ) from None
    if len(found) > _MAX_SHARDS:
        raise UserError(f"{shown(text)}: the braces name more than {_MAX_SHARDS:,} shards")
    return found


def _expand_glob(text: str, scheme: str, patience: Patience) -> list[str]:
    if scheme in ("http", "https", "pipe") or not _GLOB.search(text):
        return [text]
    if scheme == "file":
        found = [text] if Path(text).exists() else sorted(glob.glob(text))
    else:
        found = find_tars(text, patience)
    if not found:
        raise UserError(f"{text}: no file fits this pattern; check the folder and the name")
    return found


def join(folder: str, name: str) -> str:
    """URL of a file in a folder's URL; a query of the folder (a token, say) is kept."""
    if urlsplit(folder).scheme not in ("http", "https"):
        return f"{folder.rstrip('/')}/{name}"
    parts = urlsplit(folder)
    path = f"{parts.path.rstrip('/')}/{quote(name)}"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def check_name(name: object, where: str) -> str:
    """A file name out of an index: it must stay below the folder of the index.

    Raises:
        UserError: If it is absolute, climbs out of the folder, or names another place.
    """
    is_plain = (
        isinstance(name, str)
        and name != ""
        and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name)
        and not re.search(r"[\\\x00-\x1f]", name)
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )
    if not is_plain:
        raise UserError(
            f"{where}: names the file {name!r}, which does not lie below the folder; such an index "
            "is not trusted: get the set from its maker again"
        )
    return str(name)


def list_folder(location: Location, patience: Patience) -> list[str]:
    """Tars of a folder: those of its index.json, or all of them.

    Raises:
        UserError: If the folder is missing, holds no tar, or cannot be listed.
    """
    if not location.is_remote:
        return _list_local(Path(location.text))
    url = join(location.text, "index.json")
    if (data := read_if_there(url, patience)) is not None:
        return [join(location.text, name) for name in _names_of(data, url)]
    return list_without_index(location, patience)


def list_without_index(location: Location, patience: Patience) -> list[str]:
    """All tars of a remote folder that has no index.json.

    Raises:
        UserError: If there is none, or the server cannot list.
    """
    if location.scheme in ("http", "https"):
        raise UserError(
            f"{shown(location.text)}: there is no index.json, and a web server cannot be "
            "searched; name the tars with braces, as in train-{000000..000099}.tar"
        )
    found = find_tars(join(location.text, "*.tar"), patience)
    if not found:
        raise UserError(
            f"{shown(location.text)}: holds neither index.json nor .tar files; check the address"
        )
    return found


def _list_local(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards; make one with tools/make_shards.py")
    path = folder / "index.json"
    if path.exists():
        return [str(folder / name) for name in _names_of(path.read_bytes(), str(path))]
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    if not tars:
        raise UserError(
            f"{folder}: holds neither index.json nor .tar files; make shards with "
            f"tools/make_shards.py SOURCE {folder}"
        )
    return tars


def _names_of(data: bytes, where: str) -> list[str]:
    try:
        names = [shard["name"] for shard in json.loads(data)["shards"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{shown(where)}: cannot be read as an index ({error}); make the shards again"
        ) from None
    return [check_name(name, shown(where)) for name in names]
