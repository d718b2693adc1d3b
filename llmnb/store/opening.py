"""Opening a database: the one place that makes a connection, and the ``Store`` that all rooms above work with."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pymongo
from pymongo.database import Database
from pymongo.errors import PyMongoError

from ..errors import ConnectError, MissingPackage, QueryError
from ..query import Document, Query, Select
from . import address, environment, places, queries
from .addressed import Addressed, addressed
from .artifacts import Artifacts
from .chats import Chats
from .checkpoints import Checkpoints
from .clock import Clock
from .evaluations import Evaluations
from .events import Events
from .models import Models
from .runs import Runs
from .selections import Selection
from .settings import Settings
from .tables import Table, translated

__all__ = ["PREFIX", "Store", "open_store"]

PREFIX = "llmnb."
# How long to look for a server before saying that there is none; an address may say otherwise.
SELECTION_TIMEOUT_MS = 5000

_MOCKS: dict[str, Any] = {}
_LOCK = threading.RLock()


class Store:
    """An open database with our own records in it. Made by ``open_store``.

    Attributes:
        uri: the full address, a secret; None for a Database object that was handed over.
        safe_uri: the address without its password.
        name: the database's name.
        embedded: True for the embedded server that this machine runs for us.
        in_process: True when no other process can reach it by address (mongomock, a Database object).
        home: local folder for the cache (and the embedded server).
        runs, events, checkpoints, models, chats, evaluations, artifacts, settings: our own records.
    """

    def __init__(
        self,
        database: Any,
        *,
        uri: str | None,
        home: Path,
        embedded: bool = False,
        mock: bool = False,
        server_time: Any = None,
        version: str = "",
        owned: bool = True,
    ) -> None:
        self.database = database
        self.uri, self.home, self.embedded, self.mock, self.version = uri, home, embedded, mock, version
        self.name: str = database.name
        self.in_process = mock or uri is None
        self.safe_uri = address.mask_uri(uri) if uri else f"{'mongomock' if mock else 'mongodb'} Database {self.name!r}"
        self._owned = owned
        clock = Clock(server_time)
        self.settings = Settings(self._table("settings"))
        self.artifacts = Artifacts(
            self._table("artifacts", [("sample", 1)], [("claims.id", 1)]), database, self.settings, clock
        )
        events = self._table("events")
        self.runs = Runs(self._table("runs", [("state", 1)]), events, clock)
        self.events = Events(events, self.runs)
        checkpoints = self._table("checkpoints", [("experiment", 1), ("step", 1)], [("files.sha256", 1)])
        self.checkpoints = Checkpoints(checkpoints, self.artifacts, clock, Path(home) / "cache")
        self.chats = Chats(self._table("chats", [("changed", -1)]), clock)
        self.evaluations = Evaluations(self._table("evaluations"), clock)
        models = self._table("models", [("identifier", 1), ("version", 1)])
        self.models = Models(models, self._table("counters"), self.runs, clock)
        self.models.checkpoints = self.checkpoints
        self.checkpoints.users = self.models.pointing_at

    def _table(self, name: str, *indexes: Sequence[tuple[str, int]]) -> Table:
        return Table(self.database[PREFIX + name], self.safe_uri, _LOCK if self.mock else None, indexes)

    def __repr__(self) -> str:
        return f"Store({self.describe()})"

    def describe(self) -> str:
        """One line: where, which server, where artifacts go. No password is in it."""
        kind = "mongomock, in this process only" if self.mock else f"MongoDB {self.version}".strip()
        kind = f"embedded {kind}" if self.embedded else kind
        return f"{self.name} at {self.safe_uri} ({kind}; artifacts in {self.artifacts.where})"

    # -- documents ------------------------------------------------------------------------------------------

    def execute(self, query: Query) -> Any:
        """Runs a query value; see ``queries.execute`` for what comes back."""
        return queries.execute(self.database, query, self.safe_uri, self.valid_share)

    def rows(self, select: Select, fold: str | None = None, limit: int = 0) -> Iterator[Document]:
        """The selected documents, each with its ``_fold`` ("train" or "valid"); those of one fold only when given."""
        return queries.rows(self.database, select, self.safe_uri, self.valid_share, fold, limit)

    def source(self, select: Select, fold: str | None = None) -> Callable[[], Iterator[Document]]:
        """``rows`` when it is called; a ``Selection``, where the server can be asked for documents undecoded."""
        return partial(self.rows, select, fold) if self.in_process else Selection(self, select, fold)

    def addressed(self, select: Select, most: int | None = None) -> dict[str, Addressed]:
        """The selection by the ``_id`` of its documents, by fold; {} when it has ``most`` documents or fewer."""
        return addressed(self.database, select, self.safe_uri, self.valid_share, most)

    @property
    def valid_share(self) -> float:
        """Share of documents without a fold of their own that validate; ``settings.set_valid_share`` changes it."""
        return self.settings.valid_share

    def collections(self) -> dict[str, int]:
        """The person's own collections with how many documents each holds (the server's estimate)."""
        with translated(self.safe_uri):
            names = sorted(n for n in self.database.list_collection_names() if not n.startswith((PREFIX, "system.")))
            return {name: int(self.database[name].estimated_document_count()) for name in names}

    def estimate(self, select: Select) -> int:
        """About how many documents a selection gives; exact unless it selects a whole collection."""
        with translated(self.safe_uri):
            collection = self.database[select.collection]
            if select.pipeline is not None:
                stages = [*map(queries.from_extended, select.pipeline), {"$count": "n"}]
                return int(next(iter(collection.aggregate(stages)), {"n": 0})["n"])
            if select.one:
                return int(collection.count_documents(queries.from_extended(select.filter), limit=1))
            if select.filter:
                total = int(collection.count_documents(queries.from_extended(select.filter)))
            else:
                total = int(collection.estimated_document_count())
        total = max(0, total - select.skip_first)
        return min(total, select.limit_to) if select.limit_to else total

    # -- the connection -------------------------------------------------------------------------------------

    def ping(self) -> None:
        """Asks the server whether it is there. An embedded one that died is started again.

        Raises:
            ConnectError: nobody answers.
            EmbeddedError: the embedded server cannot be started again.
        """
        if self.mock:
            return
        try:
            patience = pymongo.timeout(3) if self.embedded else contextlib.nullcontext()
            with translated(self.safe_uri), patience:
                self.database.client.admin.command("ping")
        except ConnectError:
            if not self.embedded:
                raise
            from . import embedded

            server = embedded.start(self.home)
            if server.uri != self.uri:
                raise
            with translated(self.safe_uri):
                self.database.client.admin.command("ping")

    def close(self) -> None:
        """Closes the connection, unless it is a Database object that was handed over."""
        if self._owned and not self.mock:
            self.database.client.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store(
    uri: str | Database[Any] | Any | None = None, *, artifacts: str | None = None, home: Path | str | None = None
) -> Store:
    """Opens a database and proves that it answers.

    Args:
        uri: ``mongodb://…``, ``mongodb+srv://…``, ``mongomock://name`` (lives in this process only), a pymongo
            Database, or None: the environment's LLMNB_URI, else an embedded mongod in ``home``.
        artifacts: where new artifacts go, recorded in the database: an fsspec URL, or "gridfs". None: what the database
            records, else the environment's LLMNB_ARTIFACTS, else GridFS.
        home: local folder for the cache and the embedded server; default LLMNB_HOME, else ``./.llmnb``.

    Raises:
        ConnectError: wrong address, nobody answers within 5 s, wrong password.
        EmbeddedError: the embedded server cannot be started.
        MissingPackage: mongomock is not installed.
    """
    env = environment.read()
    home = Path(home).expanduser() if home is not None else env.home
    if uri is None:
        uri = env.uri
    if uri is None:
        from . import embedded

        server = embedded.start(home)
        store = _open_server(server.uri, home, embedded=True)
    elif isinstance(uri, str):
        scheme = address.check_scheme(uri.strip())
        store = _open_mock(uri.strip(), home) if scheme == "mongomock" else _open_server(uri.strip(), home)
    else:
        store = _open_object(uri, home)
    if artifacts is not None:
        store.settings.set_artifacts(places.absolute(artifacts))
    elif env.artifacts is not None and store.settings.artifacts is None:
        store.settings.set_artifacts(places.absolute(env.artifacts))
    return store


def _open_server(uri: str, home: Path, embedded: bool = False) -> Store:
    safe = address.mask_uri(uri)
    options: dict[str, Any] = {"appname": "llmnb", "tz_aware": True}
    if "serverselectiontimeoutms" not in uri.lower():
        options["serverSelectionTimeoutMS"] = SELECTION_TIMEOUT_MS
    if "connecttimeoutms" not in uri.lower():
        options["connectTimeoutMS"] = SELECTION_TIMEOUT_MS
    with translated(safe), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pymongo warns of servers that only look like MongoDB
        try:
            client: Any = pymongo.MongoClient(uri, **options)
        except ValueError as error:  # a port out of range, …
            raise ConnectError("The database's address cannot be used.", seen=f"{safe} ({error})") from error
    try:
        with translated(safe):
            hello = client.admin.command("hello")
            client.admin.command("ping")
            version = _version(client)
            database = client[address.database_name(uri)]
    except BaseException:
        client.close()
        raise
    return Store(database, uri=uri, home=home, embedded=embedded, server_time=hello.get("localTime"), version=version)


def _version(client: Any) -> str:
    with contextlib.suppress(PyMongoError):  # a user without any role may not ask; then it stays unknown
        return str(client.server_info().get("version", ""))
    return ""


def _open_mock(uri: str, home: Path) -> Store:
    try:
        import mongomock
    except ImportError as error:
        raise MissingPackage("mongomock", "mock", "mongomock://") from error
    name = address.mock_name(uri)
    with _LOCK:
        if name not in _MOCKS:
            warnings.warn(
                f"mongomock://{name} lives in this process only: what is in it is gone when the process ends. "
                "connect() without an address keeps it.",
                UserWarning,
                stacklevel=4,
            )
            _MOCKS[name] = mongomock.MongoClient(tz_aware=True)
    return Store(_MOCKS[name][name], uri=uri, home=home, mock=True)


def _open_object(database: Any, home: Path) -> Store:
    mock = type(database).__module__.startswith("mongomock")
    # By name, because mongomock is optional, and because a client answers to any attribute.
    if not isinstance(database, Database) and not (mock and type(database).__name__ == "Database"):
        raise QueryError(
            "This is not a database.",
            seen=f"{type(database).__module__}.{type(database).__name__}",
            todo="give an address (mongodb://…), or a pymongo Database: client['name']",
        )
    server_time, version = None, ""
    if not mock:
        with translated(f"mongodb Database {database.name!r}"):
            server_time = database.client.admin.command("hello").get("localTime")
            version = _version(database.client)
    return Store(database, uri=None, home=home, mock=mock, server_time=server_time, version=version, owned=False)
