"""Conversations of a database: kept under a name, opened again, and saved as documents to train on.

The part of ``Datalayer`` that knows conversations; how a checkpoint was trained decides what they become.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .checkpoint import Checkpoint
from .config import ModelSpec
from .conversation import Conversation, Form, Saved
from .errors import ConfigError, Fault, NotFound
from .query import Collection
from .store import Store

__all__ = ["Talks"]


class Talks:
    """Conversations of the database whose ``store`` this is."""

    store: Store

    def chats(self) -> list[dict[str, Any]]:
        """Conversations that are kept, newest first: name, turns, speakers, when. Their texts are not read."""
        fields = ("turns", "speakers", "created", "changed")
        return [{"name": r["_id"], **{f: r.get(f) for f in fields}} for r in self.store.chats.list()]

    def chat(self, name: str) -> Conversation:
        """A conversation that was kept.

        Raises:
            NotFound: with near names.
        """
        return Conversation.from_json(self.store.chats.get(name)["chat"])

    def keep_chat(self, chat: Conversation, name: str | None = None) -> None:
        """Keeps a conversation under a name, over its own earlier state.

        Raises:
            InUse: another conversation has that name.
        """
        name = (name or chat.name).strip()
        if not name:
            raise ConfigError([Fault("name", "is needed: a kept conversation is found by it")])
        self.store.chats.keep(name, {**chat.to_json(), "name": name})
        chat.name = name

    def save_chat(
        self,
        chat: Conversation | str,
        collection: str | None = None,
        *,
        speaker: str | None = None,
        key: str | Sequence[str] | None = None,
    ) -> Saved:
        """Writes a conversation into a collection as documents to train on.

        A model trained on messages gives one document with the whole conversation, one trained on pairs a document for
        each question, one trained on text a text for each.

        Args:
            chat: the conversation, or the name of one that is kept.
            collection: None: the one that the model was trained on.
            speaker: whose answers; None: those of the trained model that answered last.
            key: the fields to write; None: those that the model was trained on.

        Returns:
            What was written; printed, it says so.

        Raises:
            DataError: there is no answer to save.
            ConfigError: no collection is known, or the key does not fit.
        """
        chat = self.chat(chat) if isinstance(chat, str) else chat
        collection = (collection or chat.form.collection).strip()
        if not collection:
            raise ConfigError([Fault("collection", "is needed: what the model was trained on is not known")])
        documents, left_out = chat.documents(speaker, key)
        ids = self.store.execute(Collection(collection).insert_many(documents))
        folds: dict[str, int] = {}
        for document in self.store.rows(Collection(collection).find({"_id": {"$in": list(ids)}})):
            folds[document["_fold"]] = folds.get(document["_fold"], 0) + 1
        return Saved(collection, list(ids), folds, left_out)

    def trained_as(self, checkpoint: Checkpoint) -> tuple[ModelSpec, Form]:
        """The base of a checkpoint, without any adapter, as its run loaded it; and the form of the run's data."""
        spec = ModelSpec(identifier=checkpoint.experiment, model_name_or_path=checkpoint.base)
        config: dict[str, Any] = {}
        counts: dict[str, Any] = {}
        try:
            record = self.store.runs.get(checkpoint.experiment)
            config, counts = record.get("config") or {}, record.get("counts") or {}
            spec = ModelSpec.from_json(self.store.models.get(record["model"], record["version"])["spec"])
        except NotFound:
            pass  # the run or its model was removed; the checkpoint knows its base
        if config.get("prompt_template"):
            spec = replace(spec, prompt_template=config["prompt_template"])
        # Of a preference a conversation has one answer, so it is kept in the usual fields.
        key = None if config.get("method") == "dpo" else config.get("key") or counts.get("key")
        form = Form(
            kind=config.get("key_kind") or counts.get("kind") or ("messages" if key == "messages" else "text"),
            key=tuple(key) if isinstance(key, (list, tuple)) else key,
            collection=str((config.get("select") or {}).get("collection") or ""),
            template=spec.prompt_template,
            transformed=bool(config.get("transform")),
        )
        return replace(spec, adapter_id=None, bits=spec.bits or config.get("bits")), form
