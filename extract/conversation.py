"""Conversations to texts, with the place where the prompt ends and the completion begins."""

from collections.abc import Mapping, Sequence
from typing import Any

from extract.chat import ChatTemplate
from extract.messages import REASONING, ChatError, checked_messages

_COMMON_ROLES = frozenset({"system", "user", "assistant"})
_OF_ITS_OWN = (*REASONING, "tool_calls")
_MARK = "\ue000"  # a private character, which no template looks for


def chat_text(
    messages: object,
    template: ChatTemplate,
    *,
    where: str,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> tuple[str, int]:
    """The text of a conversation, and how many characters of it are the prompt.

    Where the last message is not the assistant's, all of it is the prompt. Else the completion begins with the content
    of that message, and the template's own end of the turn belongs to it. What a template writes before that content is
    prompt: for Qwen3 this is the empty block of thoughts of an answer without thoughts, which is also its generation
    prompt with `enable_thinking=False`.

    Where a template rewrites the last content, or the message has thoughts or tool calls of its own, the completion is
    what follows the generation prompt: the model would have written it. Qwen3's thoughts belong to the completion so.

    Args:
        messages: As a line of JSON has them: see `ChatTemplate.render`. They are checked.
        template: Of the model.
        where: Of the conversation, for errors: `"chats.jsonl:17"`.
        add_generation_prompt: End with what comes before an answer. Refused where there is an answer already.
        variables: Others that the template knows.

    Returns:
        Text, and a number of characters (not bytes) from 0 to its length.

    Costs two renderings of a chat that ends with the assistant, one of another; more only for rare templates and roles.

    Raises:
        ChatError: The messages are malformed, the template refuses them or leaves one out, or the end of the prompt
            cannot be told. The error begins with `where`.
        ChatTemplateError: The template does what a sandbox forbids.

    Example:
        >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}")
        >>> turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        >>> text, prompt = chat_text(turns, template, where="example")
        >>> text[:prompt], text[prompt:]
        ('<user>2 + 2?</><assistant>', '4</>')
    """
    try:
        turns = checked_messages(messages)
        text = template.render(turns, add_generation_prompt=add_generation_prompt, **variables)
        _check_all_are_there(turns, template, text, variables)
        if turns[-1]["role"] != "assistant":
            return text, len(text)
        if add_generation_prompt:
            raise ChatError(
                "the last message is the assistant's, and a generation prompt was asked for; expected one of both; "
                "leave out the message, or the generation prompt"
            )
        return text, _prompt_characters(turns, template, text, variables)
    except ChatError as error:
        raise ChatError(f"{where}: {error}") from None


def _prompt_characters(
    messages: Sequence[Mapping[str, Any]], template: ChatTemplate, text: str, variables: Mapping[str, Any]
) -> int:
    """Where the completion begins in `text`."""
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, str) and not any(last.get(name) for name in _OF_ITS_OWN):
        head, parts = _before(messages, len(messages) - 1, template, text, variables)
        body = text[len(head) :]
        # a template may strip the content, which a mark does not show
        if parts == 2 and text.startswith(head) and body.lstrip().startswith(content.strip()):
            return len(head)
    prompt = template.render(messages[:-1], add_generation_prompt=True, **variables) if len(messages) > 1 else None
    if prompt is None or not text.startswith(prompt):
        raise ChatError(
            f"{template.where} writes the last message in a way that does not show where the prompt ends; expected its "
            "content as it is, or what comes after the generation prompt; use the texts without a completion"
        )
    return len(prompt)


def _check_all_are_there(
    messages: Sequence[Mapping[str, Any]], template: ChatTemplate, text: str, variables: Mapping[str, Any]
) -> None:
    """Refuses a message that the template leaves out without a word, as many do with a role that they do not know."""
    for number, message in enumerate(messages):
        content = (message.get("content") or "").strip()
        if not content or (message["role"] in _COMMON_ROLES and content in text):
            continue
        _, parts = _before(messages, number, template, text, variables)
        if parts == 1:
            raise ChatError(
                f"{template.where} leaves out message {number} with the role {message['role']!r}; expected roles that "
                "it knows; rename the role, or leave out the message"
            )


def _before(
    messages: Sequence[Mapping[str, Any]],
    number: int,
    template: ChatTemplate,
    text: str,
    variables: Mapping[str, Any],
) -> tuple[str, int]:
    """What the template writes before a message's content, and into how many parts that content divides the text."""
    mark = _MARK
    while mark in text:
        mark += _MARK
    marked = [*messages[:number], {**messages[number], "content": mark}, *messages[number + 1 :]]
    parts = template.render(marked, **variables).split(mark)
    return parts[0], len(parts)
