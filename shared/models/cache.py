"""The folder of pulled models: verified, renamed into place whole, safe for several processes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

from shared.errors import DownloadFailed, HashMismatch, ModelFileInvalid
from shared.models.registry import ModelEntry, Registry
from shared.models.sources import (
    CACHE_VARIABLE,
    Counter,
    Progress,
    SourceFailed,
    copy_chunks,
    fetch,
    is_disk_full,
    no_disk_space,
)

_GGUF_MAGIC = b"GGUF"


def _silent(name: str, step: str, done_bytes: int, total_bytes: int) -> None:
    """The `Progress` of a caller that wants none."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model file that is there."""

    name: str
    path: Path
    entry: ModelEntry | None
    """None for a file that is not of the registry."""

    @property
    def sha256(self) -> str:
        """The registered hash, which a pulled file was checked against, or the file's own, read for it."""
        known = self.entry.sha256 if self.entry else None
        return known or file_sha256(self.path)


def file_sha256(path: Path) -> str:
    """In hexadecimal; reads the whole file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def default_cache_dir() -> Path:
    """The folder that DUET_CACHE_DIR names, else `models` in the platform's cache folder of duet."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    return Path(user_cache_dir("duet"), "models")


def resolve(
    name_or_path: str,
    registry: Registry,
    cache_dir: Path | None = None,
    progress: Progress = _silent,
) -> ResolvedModel:
    """Find the file of a registered name, pulling it if it is missing, or take a path as it is.

    A pulled file was verified before it got its name, so only its size is looked at here.

    Raises:
        UnknownModel: neither a registered name nor a file.
        ModelFileInvalid: a file that is not GGUF.
        DownloadFailed, HashMismatch, NoDiskSpace: see `ModelCache.pull`.
    """
    if name_or_path not in registry and (path := Path(name_or_path).expanduser()).is_file():
        _check_gguf(path)
        return ResolvedModel(path.stem, path.absolute(), None)
    entry = registry.entry(name_or_path)
    cache = ModelCache(cache_dir or default_cache_dir())
    path = cache.path(entry) if cache.has(entry) else cache.pull(entry, progress)
    return ResolvedModel(entry.name, path, entry)


class ModelCache:
    """One folder of models: `NAME/FILE`, what is half done in `.partial/NAME`, locks in `.locks`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, entry: ModelEntry) -> Path:
        """Where the file of `entry` is, or will be."""
        return self.folder / entry.name / entry.file

    def has(self, entry: ModelEntry) -> bool:
        path = self.path(entry)
        return path.is_file() and path.stat().st_size == entry.size_bytes

    def pull(self, entry: ModelEntry, progress: Progress = _silent) -> Path:
        """Make the file be there, and right: verify one that is there, else try the sources in order.

        A second process that pulls the same model waits for the first.

        Raises:
            DownloadFailed: every source failed, each for the reason in the message, or the folder cannot
                be written to.
            HashMismatch: as above, and at least one delivered a file of another sha256, which is removed.
            NoDiskSpace: it does not fit, seen before or while writing.
        """
        path = self.path(entry)
        with self._changing(entry):
            if not (path.exists() and _is_good(path, entry, progress)):
                path.unlink(missing_ok=True)
                self._download(entry, progress)
        return path

    def remove(self, entry: ModelEntry) -> bool:
        """Delete the file of `entry` and what is left of its pulls; False if there was nothing.

        Raises:
            DownloadFailed: the folder cannot be written to.
        """
        folders = [self.path(entry).parent, self._partial(entry)]
        with self._changing(entry):
            found = [folder for folder in folders if folder.exists()]
            for folder in found:
                shutil.rmtree(folder)
        return bool(found)

    def _partial(self, entry: ModelEntry) -> Path:
        return self.folder / ".partial" / entry.name

    @contextmanager
    def _changing(self, entry: ModelEntry) -> Iterator[None]:
        """Hold the model's lock, and turn what the file system refuses into our errors."""
        locks = self.folder / ".locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
            with FileLock(locks / f"{entry.name}.lock"):
                yield
        except OSError as error:
            if is_disk_full(error):
                raise no_disk_space(entry, self.folder, entry.size_bytes) from error
            raise DownloadFailed(
                f"cannot change {entry.name} in {self.folder} ({error.strerror or error}): "
                f"correct the folder's rights, or set {CACHE_VARIABLE} to another folder"
            ) from error

    def _download(self, entry: ModelEntry, progress: Progress) -> None:
        work = self._partial(entry)
        reasons = []
        failed_as: type[DownloadFailed | HashMismatch] = DownloadFailed
        for source in entry.sources:
            work.mkdir(parents=True, exist_ok=True)
            try:
                fetched = fetch(source, entry, work, progress)
                _verify(fetched, entry, progress)
            except SourceFailed as error:
                reasons.append(f"{source.kind}: {error}")
            except (HashMismatch, ModelFileInvalid) as error:
                # What is wrong as a whole must not be resumed.
                shutil.rmtree(work)
                reasons.append(f"{source.kind}: {error}")
                if isinstance(error, HashMismatch):
                    failed_as = HashMismatch
            else:
                _move_into_place(fetched, self.path(entry))
                shutil.rmtree(work)
                return
        raise failed_as(f"no source could deliver {entry.name}: {'; '.join(reasons)}")


def _move_into_place(fetched: Path, path: Path) -> None:
    # On the disk before it gets its name: later starts trust the name.
    with fetched.open("rb+") as file:
        os.fsync(file.fileno())
    path.parent.mkdir(exist_ok=True)
    os.replace(fetched, path)


def _is_good(path: Path, entry: ModelEntry, progress: Progress) -> bool:
    try:
        _verify(path, entry, progress)
    except (HashMismatch, ModelFileInvalid):
        return False
    return True


def _verify(path: Path, entry: ModelEntry, progress: Progress) -> None:
    """Raise HashMismatch or ModelFileInvalid unless the file is what the registry says."""
    if entry.sha256 is not None:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            copy_chunks(file, digest.update, Counter(progress, entry, "verify"))
        if digest.hexdigest() != entry.sha256:
            raise HashMismatch(f"expected sha256 {entry.sha256}, got {digest.hexdigest()}")
    if (num_bytes := path.stat().st_size) != entry.size_bytes:
        raise ModelFileInvalid(f"expected {entry.size_bytes} bytes, got {num_bytes}")
    _check_gguf(path)


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise ModelFileInvalid(f"cannot read {path}: {error.strerror}") from error
    if magic != _GGUF_MAGIC:
        raise ModelFileInvalid(f"{path} is not a GGUF file: give a model in llama.cpp's GGUF format")
