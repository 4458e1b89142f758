"""Files that are published on the web: where they are kept, how they are fetched and verified.

Downloads go to ``SAFERL_DATA_DIR`` (default ``~/.cache/saferl``) under a temporary name, resume
after an interruption, and get their final name only when complete. Their SHA-256 is recorded beside
them (``FILE.sha256``) and verified at each later load.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from saferl.errors import SaferlError

CONNECT_SECONDS = 4.0  # no network is told within 5 s
READ_SECONDS = 30.0
BLOCK = 1 << 20
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def data_dir(family: str) -> Path:
    """The folder of a family's downloads: ``$SAFERL_DATA_DIR/FAMILY``."""
    root = os.environ.get("SAFERL_DATA_DIR") or "~/.cache/saferl"
    return Path(root).expanduser() / family


def locate(
    family: str, relative: str, *, base: str, mirror: str, other: Path, download: bool
) -> Path:
    """The local path of a published file, downloaded if it is nowhere.

    Args:
        relative: the file under the base URL; its last part is the local name.
        base, mirror: base URL, and the environment variable that replaces it.
        other: a further folder to look in, which is only read.
        download: False refuses to use the network.
    """
    name = relative.rsplit("/", 1)[-1]
    target = data_dir(family) / name
    if target.is_file():
        verify(target)
        return target
    if (other.expanduser() / name).is_file():
        return other.expanduser() / name
    if not download:
        raise SaferlError(f"{name} is neither in {target.parent} nor in {other}: put it there")
    base = os.environ.get(mirror) or base
    if not base.startswith(("http://", "https://")):
        raise SaferlError(f"{mirror} must be an http:// or https:// URL, got {base!r}")
    url = base.rstrip("/") + "/" + urllib.parse.quote(relative)
    fetch(url, target, hint=f"put the file at {target}, or set {mirror} to another base URL")
    return target


# Fetching ---------------------------------------------------------------------------------------


def unreachable(url: str, seconds: float = CONNECT_SECONDS) -> str | None:
    """Why no connection to the host of ``url`` (or to its proxy) can be opened; None if one can.

    Answers within ``seconds``: looking up a name has no time limit of its own, so it happens in a
    thread that is left behind.
    """
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    outcome: list[str | None] = [f"no answer within {seconds:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname, port), timeout=seconds).close()
            outcome[0] = None
        except OSError as error:
            outcome[0] = str(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]


def fetch(url: str, target: Path, hint: str, attempts: int = 3) -> None:
    """Fetch ``url`` to ``target``, going on where an earlier attempt stopped.

    Raises:
        SaferlError: no network (within 5 s), an HTTP error, a full disk, a file that ends early or
            is not HDF5. ``hint`` says what else the user can do.
    """
    reason = unreachable(url)
    if reason:
        raise SaferlError(f"cannot reach {url} ({reason}): {hint}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    for attempt in range(attempts):
        try:
            if _request(url, part, target.name):
                break
        except urllib.error.HTTPError as error:
            error.close()
            raise SaferlError(f"{url} answered {error.code} {error.reason}: {hint}") from None
        except (OSError, http.client.HTTPException) as error:
            if attempt == attempts - 1:
                raise SaferlError(f"{url}: {error}; run again to resume, or {hint}") from None
    else:
        raise SaferlError(
            f"{url} ended early, {part.stat().st_size} bytes are in {part}: run again to resume, "
            f"or {hint}"
        )
    if reason := _damage(part):
        part.unlink()
        raise SaferlError(f"{url} {reason}: {hint}")
    _record(part, target)
    part.replace(target)
    _tag(part).unlink(missing_ok=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a downloaded file; None if HDF5 opens it."""
    import h5py

    with path.open("rb") as file:
        if file.read(len(HDF5_SIGNATURE)) != HDF5_SIGNATURE:
            return "is not an HDF5 file (a page of a web site?)"
    try:
        h5py.File(path, "r").close()
    except OSError as error:
        return f"is truncated ({error})"
    return None


def _tag(part: Path) -> Path:
    """Beside a partial file: the version of the remote file it belongs to."""
    return part.with_name(part.name + ".version")


def _request(url: str, part: Path, label: str) -> bool:
    """One request; True when ``part`` is complete."""
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "saferl"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if _tag(part).exists():  # a file that changed meanwhile is sent whole
            request.add_header("If-Range", _tag(part).read_text())
    try:
        response = urllib.request.urlopen(request, timeout=READ_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        error.close()
        if total == str(have):
            return True
        part.unlink()
        return False
    with response:
        if response.status != 206:
            have = 0
        elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            raise OSError("the server sent another part of the file than was asked for")
        length = response.headers.get("Content-Length")
        size = None if length is None else have + int(length)
        free = shutil.disk_usage(part.parent).free
        if size is not None and size - have > free:
            raise SaferlError(
                f"{url} needs {(size - have) / 1e6:.0f} MB but {part.parent} has "
                f"{free / 1e6:.0f} MB free: free some space or set SAFERL_DATA_DIR"
            )
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if version and not version.startswith("W/"):  # weak tags cannot vouch for bytes
            _tag(part).write_text(version)
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=label, disable=None)
        with part.open("ab" if have else "wb") as file, bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    return size is None or part.stat().st_size == size


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _record(source: Path, target: Path) -> None:
    _sidecar(target).write_text(f"{sha256(source)}  {target.name}\n")


def verify(path: Path) -> None:
    """Compare a file with its recorded SHA-256; files without a record pass."""
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        return
    recorded, found = sidecar.read_text().split()[:1], sha256(path)
    if recorded != [found]:
        raise SaferlError(
            f"{path} has SHA-256 {found[:12]}… but {''.join(recorded)[:12] or 'nothing'}… was "
            f"recorded when it was fetched: delete it and {sidecar.name} to download it again"
        )
