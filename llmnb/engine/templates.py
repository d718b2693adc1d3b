"""Chats to text and ids: one way for training rows and for answering, and which characters are the answers.

Source of the format: https://huggingface.co/docs/transformers/chat_templating . Most templates do not mark the answers
with ``{% generation %}``; then they are found by what the template itself writes around an answer, which is learned
from two small chats, and checked by rendering the chat again where that is not certain. This module knows no
documents and no torch.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .encoding import Encoder, fill_prompt

__all__ = ["ChatTemplate", "Chat", "begins_as_trained", "chat_ids", "prompt_ids", "stops", "tools_of"]

Message = Mapping[str, Any]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASK, _SAY = "qzxjkvq", "wvkjxzw"  # words that no template writes
_MARK = "wvkjxzw{0}w"
_MARGIN = re.compile(r"\A[ \t]+(?=\{[%#])")  # not rendered at the start of a line, but behind other text


@dataclass(frozen=True)
class Chat:
    """A rendered chat.

    Attributes:
        text: what the template wrote.
        seams: characters where answers begin, which is where the prompt of an answer ends.
        spans: character ranges that carry loss: each answer with its end-of-turn token.
        open_ended: an answer is followed by no end-of-turn token.
    """

    text: str
    seams: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    open_ended: bool = False


class ChatTemplate:
    """A tokenizer's chat template, or the one given instead.

    Raises:
        DataError: there is none.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        own = getattr(tokenizer, "chat_template", None)
        if not chat_template and not own:
            raise DataError(
                "This tokenizer has no chat template, so chats cannot be written as text.",
                todo="set chat_template='zephyr' (it needs no new tokens) or another preset or Jinja template, "
                "or turn each chat into text or a prompt and response with transform=",
            )
        self.tokenizer = tokenizer
        self.given = chat_template or None
        self.source: str = tokenizer.get_chat_template(self.given)
        self.marks_answers = bool(_GENERATION.search(self.source))
        self._specials = sorted(
            (str(token) for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True
        )
        self.tools: Sequence[Any] | None = None
        self.opener, self.closer = self._learn()

    def given_tools(self, tools: Sequence[Any] | None) -> ChatTemplate:
        """The same template for chats whose assistant may call these functions: JSON schemas, as OpenAI's ``tools``."""
        if not tools:
            return self
        other = copy(self)
        other.tools = list(tools)
        return other

    # -- rendering ---------------------------------------------------------------------------------------------------
    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The text of one chat; with ``prompt``, followed by what opens the next answer."""
        text = self.tokenizer.apply_chat_template(
            _with_objects(messages),
            tools=self.tools,
            chat_template=self.given,
            tokenize=False,
            add_generation_prompt=prompt,
        )
        return str(text)

    def render_all(self, chats: Sequence[Sequence[Message]]) -> list[str]:
        """The text of many chats."""
        texts = self.tokenizer.apply_chat_template(
            [_with_objects(chat) for chat in chats], tools=self.tools, chat_template=self.given, tokenize=False
        )
        return list(texts)

    def try_render(self, messages: Sequence[Message], prompt: bool = False) -> tuple[str | None, str]:
        """The text, or None and the template's own words on why it refuses."""
        from jinja2.exceptions import TemplateError

        try:
            return self.render(messages, prompt), ""
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            return None, str(error).strip() or type(error).__name__

    def _learn(self) -> tuple[str, str]:
        """What the template writes between a question and its answer, and the stop that it writes after an answer.

        Either is "" when the template does not say.
        """
        ask, say = {"role": "user", "content": _ASK}, {"role": "assistant", "content": _SAY}
        asked, _ = self.try_render([ask], prompt=True)
        said, _ = self.try_render([ask, say])
        opener = asked.rpartition(_ASK)[2] if asked and _ASK in asked else ""
        closer = self._stop(said.rpartition(_SAY)[2]) if said and _SAY in said else ""
        return opener, closer

    def _stop(self, after: str) -> str:
        """The end-of-turn at the beginning of what follows an answer: a special token, else the words on that line."""
        bare = after.lstrip()
        space = after[: len(after) - len(bare)]
        for special in self._specials:
            if bare.startswith(special):
                return space + special
        return after.rstrip()

    # -- finding the answers -----------------------------------------------------------------------------------------
    def chats(self, many: Sequence[Sequence[Message]]) -> list[Chat | str]:
        """Each chat rendered, with its answers found; or the reason why it cannot be."""
        from jinja2.exceptions import TemplateError

        if any(tools_of(messages) for messages in many):
            each = [self.given_tools(tools_of(messages)) for messages in many]
            return [template._chat(messages, None) for template, messages in zip(each, many, strict=True)]
        try:
            texts: list[str | None] = list(self.render_all(many)) if many else []
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
            texts = [None] * len(many)  # one of them is at fault: each is rendered alone below
        return [self._chat(messages, text) for messages, text in zip(many, texts, strict=True)]

    def _chat(self, messages: Sequence[Message], text: str | None) -> Chat | str:
        if text is None:
            text, why = self.try_render(messages)
            if text is None:
                return self._refusal(messages, why)
        found = self.answers(messages, text)
        if self.marks_answers:
            return self._marked(messages, text, found)
        if found is None:
            return "its answers could not be found in what the chat template writes"
        return self._finish(messages, text, found)

    def _refusal(self, messages: Sequence[Message], why: str) -> str:
        if messages and messages[0].get("role") == "system" and self.try_render(messages[1:])[0] is not None:
            return f"the chat template takes no system message ({why})"
        return f"the chat template refuses it ({why})"

    def _finish(self, messages: Sequence[Message], text: str, found: list[tuple[int, int]]) -> Chat:
        answers = [m for m in messages if m.get("role") == "assistant"]
        spans = tuple(span for span, message in zip(found, answers, strict=True) if message.get("weight") != 0)
        return Chat(text, tuple(begin for begin, _ in found), spans, not self.closer and bool(spans))

    def _marked(self, messages: Sequence[Message], text: str, found: list[tuple[int, int]] | None) -> Chat:
        """The answers as the template marks them, each made to reach over its end-of-turn token."""
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [{k: v for k, v in message.items() if v is not None} for message in _with_objects(messages)]
        _, indices = render_jinja_template(
            conversations=[plain],
            tools=self.tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        spans = []
        for begin, end in indices[0]:
            closed = not self.closer or text[begin:end].rstrip().endswith(self.closer.strip())
            if not closed and text.startswith(self.closer, end):
                end += len(self.closer)
            spans.append((begin, end))
        weights = [m.get("weight") for m in messages if m.get("role") == "assistant"]
        if len(weights) == len(spans):
            spans = [span for span, weight in zip(spans, weights, strict=True) if weight != 0]
        seams = tuple(begin for begin, _ in (found if found is not None else spans))
        return Chat(text, seams, tuple(spans), not self.closer and bool(spans))

    def answers(self, messages: Sequence[Message], text: str, prompt: bool = False) -> list[tuple[int, int]] | None:
        """Character ranges of the answers in a rendered chat, each with its end-of-turn; None when not found.

        Args:
            messages: the chat.
            text: what ``render`` gave for it.
            prompt: the text ends with the opening of an answer that is still to come.
        """
        where = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not where:
            return []
        return (
            self._by_opener(messages, text, where, prompt)
            or self._by_rendering(messages, text, where)
            or self._by_marks(messages, text, where, prompt)
        )

    def _by_opener(
        self, messages: Sequence[Message], text: str, where: list[int], prompt: bool
    ) -> list[tuple[int, int]] | None:
        """By what opens each answer. Only when it stands in the text as often as there are answers."""
        if not self.opener or text.count(self.opener) != len(where) + prompt:
            return None
        found: list[tuple[int, int]] = []
        at = 0
        for index in where:
            begin = text.index(self.opener, at) + len(self.opener)
            bound = text.find(self.opener, begin)
            content = messages[index].get("content")
            end = self._end_of(str(content).strip(), text, begin, len(text) if bound < 0 else bound)
            if not isinstance(content, str) or end is None:
                return None
            found.append((begin, end))
            at = end
        return found

    def _end_of(self, content: str, text: str, begin: int, bound: int) -> int | None:
        """Where an answer ends: after its words and the stop that follows them. A reasoning block may come before."""
        at = text.find(content, begin, bound)
        while at >= 0:
            end = at + len(content)
            if not self.closer:
                return end
            if text.startswith(self.closer, end):
                return end + len(self.closer)
            bare = text[end:bound].lstrip()
            if bare.startswith(self.closer.strip()):  # the template kept spaces of the answer that we stripped
                return bound - len(bare) + len(self.closer.strip())
            at = text.find(content, at + 1, bound)
        return None

    def _by_rendering(self, messages: Sequence[Message], text: str, where: list[int]) -> list[tuple[int, int]] | None:
        """By rendering the chat up to each answer, where the template only ever adds text at the end."""
        found = []
        for index in where:
            before, _ = self.try_render(messages[:index], prompt=True) if index else (None, "")
            upto, _ = self.try_render(messages[: index + 1])
            if not before or not upto or not text.startswith(before) or not text.startswith(upto):
                return None
            if len(upto) <= len(before):
                return None
            content = messages[index].get("content")
            end = self._end_of(content.strip(), text, len(before), len(upto)) if isinstance(content, str) else None
            found.append((len(before), max(len(before), len(upto.rstrip())) if end is None else end))
        return found

    def _by_marks(
        self, messages: Sequence[Message], text: str, where: list[int], prompt: bool
    ) -> list[tuple[int, int]] | None:
        """By rendering the chat with a mark in place of each answer: what stands around the marks is the template's."""
        marked = [dict(message) for message in messages]
        for index in where:
            if not isinstance(marked[index].get("content"), str):
                return None
            marked[index]["content"] = _MARK.format(index)
        rendered, _ = self.try_render(marked, prompt)
        pieces: list[str] = []
        for index in where:
            if rendered is None or rendered.count(_MARK.format(index)) != 1:
                return None
            piece, _, rendered = rendered.partition(_MARK.format(index))
            pieces.append(piece)
        if rendered is None or not text.startswith(pieces[0]):
            return None
        found = []
        at = len(pieces[0])
        for number, following in enumerate([*pieces[1:], rendered]):
            if number < len(where) - 1:
                end = text.find(following, at)
            else:  # the last piece may be short, or empty: it is what the text ends with
                end = len(text) - len(following) if text.endswith(following) else -1
            if end < at:
                return None
            header = pieces[number].rfind(self.opener) if self.opener else -1
            begin = at - len(pieces[number]) + header + len(self.opener) if header >= 0 else at
            stop = len(self.closer) if self.closer and following.startswith(self.closer) else 0
            found.append((begin, end + stop))
            at = end + len(following)
        return found


def tools_of(messages: Any) -> list[Any] | None:
    """The functions that a chat's assistant may call, where it has any (``samples.Messages``)."""
    return getattr(messages, "tools", None)


def _with_objects(messages: Sequence[Message]) -> list[Message]:
    """Arguments of calls as objects. OpenAI writes them as text, which templates would quote once more."""
    if not any("tool_calls" in message for message in messages):
        return list(messages)
    return [_called(message) if message.get("tool_calls") else message for message in messages]


def _called(message: Message) -> Message:
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or {})
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):
                function["arguments"] = json.loads(function["arguments"])
        calls.append({**call, "function": function} if function else call)
    return {**message, "tool_calls": calls}


def chat_ids(messages: Sequence[Message], tokenizer: Any, chat_template: str | None = None) -> list[int]:
    """Ids of a chat that waits for an answer: exactly those that a training row of the same chat begins with.

    Args:
        messages: dicts with role and content, the last one not the assistant's; ``samples.Messages`` with tools.
        tokenizer: the transformers tokenizer.
        chat_template: a Jinja template, when not the tokenizer's own.

    Raises:
        DataError: there is no chat template, or it refuses these messages.
    """
    template, encoder = ChatTemplate(tokenizer, chat_template).given_tools(tools_of(messages)), Encoder(tokenizer)
    text, why = template.try_render(messages, prompt=True)
    if text is None:
        raise DataError("The chat template refuses these messages.", seen=why, todo="change the order or the roles")
    found = template.answers(messages, text, prompt=True) or []
    ids, _ = encoder.joined(text, [begin for begin, _ in found])
    return [int(i) for i in encoder.start(ids)[0]]


def prompt_ids(text: str, tokenizer: Any, prompt_template: str = "{input}") -> list[int]:
    """Ids of a prompt that waits for its response: exactly those that a training row of the same prompt begins with."""
    encoder = Encoder(tokenizer)
    return [int(i) for i in encoder.start(encoder.ids(fill_prompt(prompt_template, text)))[0]]


def begins_as_trained(tokenizer: Any) -> Any:
    """A tokenizer whose chat template writes the start (usually the BOS) that each of our rows has.

    Whoever reads what is saved takes a chat's ids from its template alone: ``apply_chat_template(tokenize=True)`` adds
    no special token. Our own ids stay as they are, since ``Encoder.start`` keeps exactly one start.

    Returns:
        ``tokenizer`` itself where nothing is missing, or where writing the start would not give the trained ids; else a
        shallow copy.
    """
    own = getattr(tokenizer, "chat_template", None)
    encoder = Encoder(tokenizer)
    if not own or not encoder.prefix:
        return tokenizer
    if isinstance(own, Mapping):
        template: Any = {name: _begun(tokenizer, encoder, str(text)) for name, text in own.items()}
    else:
        template = _begun(tokenizer, encoder, own)
    if template == own:
        return tokenizer
    other = copy(tokenizer)
    other.chat_template = template
    return other


def _begun(tokenizer: Any, encoder: Encoder, template: str) -> str:
    prefix = encoder.prefix
    start = "bos_token" if prefix == (encoder.bos,) else json.dumps(tokenizer.decode(prefix))
    begun = f"{{{{ {start} }}}}" + _MARGIN.sub("", template)
    old, new = ChatTemplate(tokenizer, template), ChatTemplate(tokenizer, begun)
    system, ask, say = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    for messages in ([ask], [ask, say, ask], [system, ask]):
        before, after = (one.try_render(messages, prompt=True)[0] for one in (old, new))
        if before is None and messages[0] is system:
            continue
        if before is None or after is None or encoder.ids(after) != encoder.start(encoder.ids(before))[0]:
            return template
    return begun


def stops(tokenizer: Any, own: int | Sequence[int] | None, chat: bool) -> tuple[list[int], list[str]]:
    """Token ids that end an answer, and strings that do where no single token does.

    Args:
        tokenizer: its EOS ends every answer.
        own: the model's own ``generation_config.eos_token_id``.
        chat: answers are turns of a chat, and end with what the chat template writes after one.
    """
    ids = {*([own] if own is None or isinstance(own, int) else own), tokenizer.eos_token_id}
    words: list[str] = []
    if chat:
        closer = ChatTemplate(tokenizer).closer.strip()
        closing = tokenizer.encode(closer, add_special_tokens=False) if closer else []
        if len(closing) == 1:
            ids.add(closing[0])
        elif closing:
            words.append(closer)
    return sorted(i for i in ids if i is not None), words
