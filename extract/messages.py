"""Messages of a conversation: what a chat template is given, checked."""

from collections.abc import Mapping
from typing import Any

from actstore.errors import InputError
from actstore.visible import visible

REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing under three names; templates know the first

_SHOWN = 200  # characters of a foreign text in an error


class ChatError(InputError):
    """These messages cannot be rendered: they are malformed, or the template does not take them."""


def checked_messages(messages: object) -> list[dict[str, Any]]:
    """Copies of the messages as a template sees them.

    Fields that are null are left out, and thoughts have the name that templates read, as in transformers.

    Raises:
        ChatError: They are malformed.
    """
    if not isinstance(messages, list | tuple) or not messages:
        found = "no messages" if isinstance(messages, list | tuple) else f"messages of type {type(messages).__name__}"
        raise ChatError(f"found {found}; expected a list of at least one; give {{role, content}} for each turn")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatError(
                f"message {number} is a {type(message).__name__}; expected an object; write "
                '{"role": "user", "content": "..."}'
            )
        fields = {name: value for name, value in message.items() if value is not None}
        if not isinstance(fields.get("role"), str):
            raise ChatError(
                f"message {number} has the role {message.get('role')!r}; expected a text; write system, user or "
                "assistant, or what the template knows"
            )
        if not isinstance(fields.get("content"), str) and not ("content" not in fields and fields.get("tool_calls")):
            found = f"content of type {type(fields['content']).__name__}" if "content" in fields else "no content"
            raise ChatError(
                f"message {number} ({shortened(fields['role'])}) has {found}; expected a text; join its parts "
                "into one text"
            )
        thoughts = next((fields[name] for name in REASONING if name in fields), None)
        if thoughts is not None:
            fields = {"thinking": thoughts} | fields | {"reasoning_content": thoughts}
        checked.append(plain(fields, f"message {number}"))
    return checked


def plain(value: Any, where: str) -> Any:
    """A copy in plain JSON values: templates may call methods, so they see no other objects.

    Raises:
        ChatError: `where` holds something else.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where) for item in value]
    raise ChatError(
        f"{where} hold a value of type {type(value).__name__}; expected values of JSON; turn it into text or numbers"
    )


def shortened(text: str) -> str:
    """A foreign text for an error: one line, of bounded length, that no terminal obeys."""
    return visible(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
