"""What the magics of one shell share: the connected database, the poller, the chat process.

The database is opened on the first need; ``llmnb.db`` and all that stands on it is imported only then.
"""

from __future__ import annotations

import weakref
from typing import Any

from ..errors import ConfigError, Fault

__all__ = ["Session", "place"]


def place(store: Any) -> str:
    """Where a database is, in a few words and without a URI, for outputs that are saved with the notebook."""
    if store.embedded:
        return f"{store.name} @ mongod (embedded)"
    if store.in_process:
        return f"{store.name} (in this process only)"
    return f"{store.name} @ {str(store.safe_uri).partition('://')[2].rpartition('@')[2].partition('/')[0]}"


class Session:
    """One shell's state.

    Attributes:
        shell: the IPython shell.
        typed: what the training panel held last, for the next one; None before the first.
        last_chat: the conversation that was asked last; None before the first.
    """

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self._database: Any = None
        self._poller: Any = None
        self._chats: Any = None
        self._previews: Any = None
        self.typed: dict[str, Any] | None = None
        self.pickers: weakref.WeakSet[Any] = weakref.WeakSet()  # those with a merge under way end it with us
        self.last_chat: Any = None

    # -- the database ----------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """True when a database is at hand. Asking opens nothing."""
        return self._database is not None

    def connect(self, where: str | None = None) -> Any:
        """Opens a database: a URI, or the name of a variable that holds a ``Datalayer`` or a pymongo ``Database``."""
        from ..db import Datalayer, connect

        found = self.shell.user_ns.get(where) if where else None
        if isinstance(found, Datalayer):
            database = found
        elif found is not None and type(found).__name__ == "Database":
            database = connect(found)
        elif where and "://" not in where:
            todo = "a URI like mongodb://host/name, or nothing for the database of this folder"
            raise ConfigError([Fault(where, "is neither a URI nor a variable that holds a database", todo)])
        else:
            database = connect(where)
        if self._database is not None and database is not self._database:
            self.close_chats()
        self._database = database
        return database

    def database(self) -> Any:
        """The connected database; the default one is opened, and said, when none is."""
        if self._database is None:
            database = self.connect()
            print(f"Connected to {place(database.store)}. Another one: %llm_connect URI")
        return self._database

    # -- views -----------------------------------------------------------------------------------------------

    @property
    def in_notebook(self) -> bool:
        """False in a terminal, where no widget can be shown."""
        return hasattr(self.shell, "kernel")

    def watch(self, run: Any, others: list[str] | None = None) -> None:
        """Shows the live view of a run (its handle) in the cell that runs; ``others``: ids of runs to draw over it."""
        if not self.in_notebook:
            self._say(run)
            return
        from .runview import RunView

        RunView(self, run, others).display()

    def open_panel(self) -> None:
        """Shows the training panel in the cell that runs."""
        from .panel import Panel

        Panel(self, self.database()).display()

    def pick(self, experiment: str | None = None) -> None:
        """Shows the checkpoint picker in the cell that runs."""
        from .picker import PickerView

        PickerView(self, self.database(), experiment).display()

    def previews(self) -> Any:
        """The process that makes rows for the training panel to show."""
        if self._previews is None:
            from ..launch.preview import PreviewProcess

            self._previews = PreviewProcess()
        return self._previews

    def close_previews(self) -> None:
        """Ends it and gives its memory back."""
        if self._previews is not None:
            self._previews.close()
            self._previews = None

    def poller(self) -> Any:
        """The one thread that reads what runs say."""
        if self._poller is None:
            from .poller import Poller

            self._poller = Poller()
        return self._poller

    @staticmethod
    def _say(run: Any) -> None:
        import time

        from . import still
        from .poller import read
        from .words import status

        curve, record = read(run)
        print(still.text(curve, still.title_of(record), status(curve, time.time())))

    # -- chats -----------------------------------------------------------------------------------------------

    def chats(self) -> Any:
        """The processes that answer ``%%llm_chat``."""
        if self._chats is None:
            from .chat import Chats

            self._chats = Chats()
        return self._chats

    def close_chats(self) -> None:
        """Ends the chat processes and gives their memory back."""
        if self._chats is not None:
            self._chats.close()

    def close(self) -> None:
        """Ends everything that runs for this shell here. Training goes on."""
        if self._poller is not None:
            self._poller.stop()
            self._poller = None
        self.close_chats()
        self.close_previews()
        for picker in list(self.pickers):
            picker.close()
        self._database = None  # it may be the person's own: not ours to close
