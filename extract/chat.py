"""Chat templates: the text that a model reads for a conversation, as its own tokenizer's template writes it."""

import dataclasses
import datetime as dt
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.errors import InputError, UnknownNameError
from extract.messages import ChatError, checked_messages, plain, shortened
from extract.special_tokens import CONFIG, named_tokens, read_tokenizer_config

if TYPE_CHECKING:
    from extract.sandbox import Program

TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
DEFAULT = "default"


class ChatTemplateError(InputError):
    """A chat template is no template, or does what a sandbox forbids. No messages will render."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens that it may write.

    The texts are those of transformers' `apply_chat_template`, character for character.

    Attributes:
        source: The template in Jinja.
        tokens: Special tokens by name: `bos_token`, `eos_token` and others.
        where: Where the template was found, for messages.
        now: What `strftime_now` tells a template that writes the date; None for the moment of rendering. Fix it where
            the same chats must give the same texts tomorrow: see `reads_the_clock`.

    Raises:
        ChatTemplateError: `source` is no template.

    Example:
        >>> template = ChatTemplate("{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}")
        >>> template.render([{"role": "user", "content": "2 + 2?"}])
        '<user>2 + 2?'
    """

    source: str = dataclasses.field(repr=False)
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    where: str = dataclasses.field(default="the chat template", compare=False)
    now: dt.datetime | None = None

    def __post_init__(self) -> None:
        _ = self._program  # a broken template is refused now, not at its first chat

    @property
    def digest(self) -> str:
        """SHA-256 of the template, its special tokens and its date: equal ones write equal texts."""
        parts = [self.source, dict(self.tokens), self.now and self.now.isoformat()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def reads_the_clock(self) -> bool:
        """Whether the text can differ from day to day: the template asks for the date, and `now` is not set."""
        return self.now is None and self._program.reads_the_clock

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation.

        Args:
            messages: At least one. Each has a `role` and a `content`, both texts; where there are `tool_calls`, the
                content may be left out. Other fields are handed to the template. All values are of JSON.
            add_generation_prompt: End with what comes before an answer of the assistant.
            variables: Others that the template knows, such as `tools` or `enable_thinking`; of JSON too.

        Costs some ten microseconds per message.

        Raises:
            ChatError: The messages are malformed, or the template refuses them.
            ChatTemplateError: The template does what a sandbox forbids.
        """
        import jinja2

        from extract.sandbox import EndlessError, RefusedError

        given = {"tools": None, "documents": None, **self.tokens, **plain(variables, "the variables")}
        given |= {"messages": checked_messages(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._program.render(given)
        except RefusedError as error:
            raise ChatError(
                f"{self.where} refuses these messages: {_seen(error)}; expected messages as the model takes them; "
                "change or leave out these, or give another template"
            ) from None
        except (jinja2.exceptions.SecurityError, EndlessError, OverflowError, RecursionError, MemoryError) as error:
            raise ChatTemplateError(
                f"{self.where} does what is not allowed: {_seen(error)}; expected a template that only writes the text "
                "of a chat; look at it, and give one that you trust"
            ) from None
        except jinja2.UndefinedError as error:
            raise ChatError(
                f"{self.where} asks for something that is not there: {_seen(error)}; expected it in the messages or "
                "among the variables; give it, or give another template"
            ) from None
        except Exception as error:  # noqa: BLE001  an expression of a template may raise anything
            raise ChatError(
                f"{self.where} fails with these messages: {type(error).__name__}: {_seen(error)}; expected messages as "
                "the model takes them; change or leave out these, or give another template"
            ) from None

    @functools.cached_property
    def _program(self) -> "Program":
        import jinja2

        from extract.sandbox import Program

        try:
            return Program(self.source, now=self.now)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"{self.where} is no Jinja template (line {error.lineno}: {_seen(error)}); expected one as "
                "transformers reads it; mend it, or fetch it again"
            ) from None
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:  # what only Python's own compiler sees
            raise ChatTemplateError(
                f"{self.where} is no Jinja template ({_seen(error)}); expected one as transformers reads it; mend it, "
                "or fetch it again"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        """The fields: compiled templates do not travel to other processes."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def load_chat_template(
    folder: str | Path, *, name: str = DEFAULT, now: dt.datetime | None = None
) -> ChatTemplate | None:
    """The chat template of a tokenizer's folder; None where it has none, as base models have.

    Looked for as transformers does: `chat_template.jinja` and `additional_chat_templates/*.jinja`, else
    `chat_template` of `tokenizer_config.json`, a text or a list of named ones.

    Args:
        folder: Of a model or tokenizer, as HuggingFace saves it.
        name: Which one, where there are several, such as `tool_use`.
        now: See `ChatTemplate`.

    Raises:
        ChatTemplateError: It is no template, or the file cannot be read.
        UnknownNameError: The folder has templates, but none of that name.
        InputError: `tokenizer_config.json` is malformed.
    """
    found = _templates(Path(folder))
    if not found:
        return None
    if name not in found:
        raise UnknownNameError(
            f"{folder} has no chat template {name!r}; expected {' or '.join(sorted(found))}; give the name of one"
        )
    source, where = found[name]
    return ChatTemplate(source, named_tokens(folder), f"the chat template of {where}", now)


def _templates(folder: Path) -> dict[str, tuple[str, Path]]:
    """Sources of all templates of a folder by name, with where each was found."""
    files = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE).is_file():
        files[DEFAULT] = folder / TEMPLATE
    if files:
        return {name: (_read(path), path) for name, path in files.items()}
    path, value = folder / CONFIG, read_tokenizer_config(folder).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: (value, path)}
    try:
        named = {entry["name"]: entry["template"] for entry in value}
        texts = all(isinstance(text, str) for pair in named.items() for text in pair)
    except (TypeError, KeyError):
        texts = False
    if not texts:
        raise ChatTemplateError(
            f"{path} has a chat_template that is neither a text nor a list of named texts; expected one of both; "
            "fetch the file again"
        )
    return {name: (text, path) for name, text in named.items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ChatTemplateError(
            f"{path} is not UTF-8 (byte {error.start}); expected a chat template; fetch the file again"
        ) from None


def _seen(error: BaseException) -> str:
    """What a template says, in one line that no terminal obeys."""
    return shortened(str(error) or type(error).__name__)
