"""Places for stores, by URL: object storage (s3, gs, az, file; http to read) and dataset repositories (hf).

A place reads and writes objects by name, and replaces one of them, the state (state.py), only if it is still the one
that was read: of two pushes at once the second is refused. obstore is the library for object storage; it takes
credentials from the environment and from the cloud's own files. They never stand in a URL, and no message shows them.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from gradstore import exclusive
from gradstore.errors import DamagedError, GradstoreError, NotAStoreError, RequestError, first_line, needing
from gradstore.travel.sources import Source, Wanted, ZarrSource, check_sizes
from gradstore.travel.state import MOST_BYTES, STATE
from gradstore.travel.urls import URL

T = TypeVar("T")
EXTRA = "gradstore[remote]"
_FORMS = "s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, file:///PATH, https://HOST/PATH or hf://datasets/USER/NAME"
_READ_ONLY = ("http", "https")
_SECRETS = re.compile(r"(AWS|GOOGLE|AZURE|HF|HUGGING)_?.*(KEY|TOKEN|SECRET|SAS|PASSWORD)", re.IGNORECASE)
_COMMIT_BYTES = 512 << 20
"""Bytes that are sent to a dataset repository in one commit."""
_THREADS = 8


class ChangedError(GradstoreError):
    """Somebody else pushed to the place meanwhile."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url}: another push changed it meanwhile; nothing was changed: push again")


class Place(Protocol):
    """Objects below a URL. `requests` counts what was asked, `sent` the bytes that were written."""

    url: str
    source: Source
    sent: int

    @property
    def requests(self) -> int: ...

    def alone(self) -> "Any":
        """Context manager: keeps other pushes of this machine away, where the place needs it."""

    def read_state(self) -> tuple[bytes | None, object]:
        """The state's bytes, None if there is none, and a token for `replace_state`."""

    def replace_state(self, data: bytes, token: object) -> None:
        """Put the state, and with it all objects before it; ChangedError if it is no longer the one of the token."""

    def put(self, key: str, data: bytes) -> None:
        """Write an object; it may only be there when `replace_state` returns."""

    def objects(self) -> dict[str, float]:
        """Every object -> when it was written, in Unix seconds."""

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects."""


def place_at(url: str, *, write: bool = False) -> Place:
    """The place of a URL. RequestError for a URL that cannot be, or that can only be read if `write`."""
    match = URL.fullmatch(url)
    if match is None or not url.isprintable():
        raise RequestError(f"{_masked(url)!r:.200} is no URL; expected {_FORMS}")
    scheme, rest = match[1].lower(), match[2]
    if scheme not in ("s3", "gs", "az", "file", "hf", *_READ_ONLY):
        raise RequestError(f"{_masked(url)}: {scheme}:// is not known; expected {_FORMS}")
    if "@" in rest.split("/")[0] or "?" in rest or "#" in rest:
        raise RequestError(f"{_masked(url)}: a URL has no credentials, '?' or '#'; give credentials in the environment")
    if not rest.strip("/") or ".." in rest.split("/"):
        raise RequestError(f"{url}: is no place; expected {_FORMS}")
    if write and scheme in _READ_ONLY:
        raise RequestError(f"{url}: can only be read; push to s3://, gs://, az://, file:// or hf://")
    url = f"{scheme}://{rest.rstrip('/')}"
    if scheme == "hf":
        return HubPlace(url)
    return ObjectPlace(url, write)


def _masked(url: str) -> str:
    """A URL for messages, without what may be a secret."""
    return re.sub(r"//[^/@]*@", "//***@", re.split(r"[?#]", url)[0])[:300]


def said(error: BaseException) -> str:
    """First line of a library's error, without the secrets of the environment."""
    text = first_line(error)
    for name, value in os.environ.items():
        if len(value) > 3 and _SECRETS.match(name):
            text = text.replace(value, "***")
    return text


class ObjectPlace:
    """A prefix in object storage, a folder of this machine, or a web server (to read)."""

    def __init__(self, url: str, write: bool) -> None:
        with needing(url, EXTRA):
            import obstore
            from obstore.store import LocalStore, from_url
        self.url, self.sent, self._own = url, 0, 0
        self._obstore = obstore
        self._folder = Path(unquote(urlsplit(url).path)) if url.startswith("file://") else None
        if self._folder is not None and urlsplit(url).netloc:
            raise RequestError(f"{url}: a file's URL has three slashes: file:///PATH")
        if self._folder is not None and not write and not self._folder.is_dir():
            raise NotAStoreError(f"{url}: there is no such folder")
        try:
            if self._folder is not None:
                self._store: Any = LocalStore(prefix=self._folder, mkdir=True) if write else None
            else:
                options: Any = {"timeout": timedelta(minutes=10), "allow_http": _plain_http(url)}
                retry: Any = {"max_retries": 5, "retry_timeout": timedelta(minutes=1)}
                self._store = from_url(url, client_options=options, retry_config=retry)
        except Exception as error:  # noqa: BLE001 (each library has its own; `from error` could show secrets)
            raise RequestError(f"{url}: cannot be used ({said(error)})") from None
        self._zarr = ZarrSource(self._zarr_store(), url, said)
        self.source: Source = self._zarr

    def _zarr_store(self) -> Any:
        from zarr.storage import LocalStore, ObjectStore

        if self._folder is not None:
            return LocalStore(self._folder, read_only=True)
        return ObjectStore(self._store, read_only=True)

    @property
    def requests(self) -> int:
        return self._own + self._zarr.requests

    @contextmanager
    def alone(self) -> Iterator[None]:
        if self._folder is None:
            yield
            return
        try:
            release = exclusive.lock(os.open(self._folder, os.O_RDONLY), self._folder, wait=False)
        except BlockingIOError:
            raise GradstoreError(f"{self.url}: another push is at work here; wait until it has finished") from None
        except OSError as error:
            raise RequestError(f"{self.url}: cannot be written ({error.strerror})") from None
        try:
            yield
        finally:
            release()

    def read_state(self) -> tuple[bytes | None, object]:
        def read() -> tuple[bytes | None, object]:
            try:
                found = self._obstore.get(self._store, STATE)
            except FileNotFoundError:
                return None, None
            if found.meta["size"] > MOST_BYTES:
                raise DamagedError(f"{self.url}: {STATE} has {found.meta['size']} bytes, a state at most {MOST_BYTES}")
            token = {name: found.meta[name] for name in ("e_tag", "version") if found.meta.get(name)}
            return bytes(found.bytes()), token

        return self._reached("read", read)

    def replace_state(self, data: bytes, token: Any) -> None:
        unsupported = (NotImplementedError, self._obstore.exceptions.NotSupportedError)
        lost = (self._obstore.exceptions.PreconditionError, self._obstore.exceptions.AlreadyExistsError)

        def put() -> None:
            try:
                if self._folder is not None:  # Under a lock.
                    raise NotImplementedError
                self._obstore.put(self._store, STATE, data, mode=token or "create", use_multipart=False)
            except unsupported:
                if self.read_state()[1] != token:
                    raise ChangedError(self.url) from None
                self._obstore.put(self._store, STATE, data, use_multipart=False)
            except lost:
                if self.read_state()[0] != data:  # The answer to a first try may have been lost.
                    raise ChangedError(self.url) from None

        self._reached("written", put)
        self.sent += len(data)

    def put(self, key: str, data: bytes) -> None:
        self._reached("written", lambda: self._obstore.put(self._store, key, data, use_multipart=False))
        self.sent += len(data)

    def objects(self) -> dict[str, float]:
        def read() -> dict[str, float]:
            found = [one for page in self._obstore.list(self._store, chunk_size=1000) for one in page]
            self._own += max(0, -(-len(found) // 1000) - 1)
            return {one["path"]: _seconds(one["last_modified"]) for one in found}

        with suppress(FileNotFoundError):
            return self._reached("listed", read)
        return {}

    def remove(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), 1000):
            some = list(keys[start : start + 1000])
            self._reached("written", partial(self._obstore.delete, self._store, some))

    def _reached(self, what: str, work: Callable[[], T]) -> T:
        self._own += 1
        try:
            return work()
        except GradstoreError:
            raise
        except Exception as error:  # noqa: BLE001 (each library has its own; `from error` could show secrets)
            raise GradstoreError(f"{self.url}: cannot be {what} ({said(error)})") from None


def _plain_http(url: str) -> bool:
    """Whether the user names an endpoint without TLS, as a server of one's own may have."""
    endpoints = (os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"))
    return url.startswith("http://") or any(endpoint.startswith("http://") for endpoint in endpoints)


def _seconds(time: datetime) -> float:
    return time.timestamp()


class HubPlace:
    """A dataset repository of Hugging Face, or a folder of it: hf://datasets/USER/NAME[@REVISION][/FOLDER].

    Objects are gathered into commits. The last one brings the state and names the commit before it, so that it is
    refused if somebody else committed meanwhile. Readers keep to one commit.
    """

    def __init__(self, url: str) -> None:
        match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", url)
        if match is None:
            raise RequestError(f"{url}: expected hf://datasets/USER/NAME, with @REVISION and /FOLDER if wanted")
        with needing(url, EXTRA):
            from huggingface_hub import HfApi, HfFileSystem
        self.url, self.sent, self.requests = url, 0, 0
        self._repository, self._revision, self._folder = match[1], match[2], match[3] or ""
        self._api = HfApi()
        self._files = HfFileSystem()
        self._head: str | None = None
        self._lock = Lock()
        self._waiting: dict[str, bytes] = {}
        self._objects: dict[str, int] = {}
        self.source: Source = self

    def __str__(self) -> str:
        return self.url

    @contextmanager
    def alone(self) -> Iterator[None]:
        yield

    def read_state(self) -> tuple[bytes | None, object]:
        self.renew()
        return self.get([Wanted(STATE, 1 << 30)])[0], self._head

    def replace_state(self, data: bytes, token: object) -> None:
        self._waiting[STATE] = data
        self._commit("gradstore push")

    def put(self, key: str, data: bytes) -> None:
        with self._lock:  # Several threads put.
            self._waiting[key] = data
            if sum(map(len, self._waiting.values())) > _COMMIT_BYTES:
                self._commit("gradstore push, in part")

    def objects(self) -> dict[str, float]:
        # The age does not matter: past commits keep what later ones remove.
        return dict.fromkeys(self._objects, time.time())

    def listed(self, folder: str) -> list[str]:
        inside = f"{folder}/"
        return sorted({name[len(inside) :].split("/")[0] for name in self._objects if name.startswith(inside)})

    def sizes(self, keys: Sequence[str]) -> list[int]:
        return check_sizes(self, keys, [self._objects.get(key, 0) for key in keys])

    def remove(self, keys: Sequence[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        self._send([CommitOperationDelete(self._path(key)) for key in keys], "gradstore push, old objects")

    def _commit(self, message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        added = [CommitOperationAdd(self._path(key), data) for key, data in self._waiting.items()]
        self._send(added, message)
        self.sent += sum(map(len, self._waiting.values()))
        self._waiting.clear()

    def _send(self, operations: list, message: str) -> None:
        def send() -> str:
            done = self._api.create_commit(
                self._repository,
                operations,
                commit_message=message,
                repo_type="dataset",
                revision=self._revision,
                parent_commit=self._head,
            )
            return str(done.oid)

        self._head = self._reached("written", send)

    def renew(self) -> bool:
        """Take the newest commit; whether there is a newer one than before."""
        before = self._head
        found = self._reached(
            "read",
            lambda: self._api.repo_info(
                self._repository, repo_type="dataset", revision=self._revision, files_metadata=True
            ),
        )
        self._head = str(found.sha)
        prefix = f"{self._folder}/" if self._folder else ""
        sizes = {one.rfilename: one.size or 0 for one in getattr(found, "siblings", None) or []}
        self._objects = {name[len(prefix) :]: size for name, size in sizes.items() if name.startswith(prefix)}
        return self._head != before

    def get(self, wanted: Sequence[Wanted]) -> list[bytes | None]:
        if self._head is None:
            self.renew()

        def read(one: Wanted) -> bytes | None:
            path = f"datasets/{self._repository}@{self._head}/{self._path(one.key)}"

            def cat() -> bytes | None:
                with suppress(FileNotFoundError):
                    return bytes(self._files.cat_file(path, one.start, one.start + one.most))
                return None

            return self._reached("read", cat)

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(read, wanted))

    def _path(self, key: str) -> str:
        return f"{self._folder}/{key}" if self._folder else key

    def _reached(self, what: str, work: Callable[[], T]) -> T:
        self.requests += 1
        try:
            return work()
        except Exception as error:  # noqa: BLE001 (each library has its own; `from error` could show secrets)
            if getattr(getattr(error, "response", None), "status_code", None) == 412:
                raise ChangedError(self.url) from None
            raise GradstoreError(f"{self.url}: cannot be {what} ({said(error)})") from None
