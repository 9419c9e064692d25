"""Conversations to text and prompt: against the generation prompt of transformers, and message by message."""

from typing import Any

import pytest
from conversations import Message, conversations, reference
from test_chat import TOKENS, source

from extract.chat import ChatTemplate
from extract.conversation import chat_text
from extract.messages import ChatError

USER = {"role": "user", "content": "2 + 2?"}
EMPTY = "<think>\n\n</think>\n\n"


def template_of(name: str) -> ChatTemplate:
    return ChatTemplate(source(name), TOKENS[name])


def answer(content: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": content} | more


ALTERNATING = [each for number, each in enumerate(conversations(500)) if number % 20 != 19]


@pytest.mark.parametrize("name", list(TOKENS))
def test_the_prompt_is_what_transformers_gives_a_model(name: str) -> None:
    """For conversations that end with the assistant; Qwen3 is told whether the answer has thoughts."""
    template, original = template_of(name), reference(source(name), **TOKENS[name])
    answered = 0
    for messages in ALTERNATING:
        text, prompt = chat_text(messages, template, where="test")
        assert text == original.apply_chat_template(messages, tokenize=False)
        if messages[-1]["role"] != "assistant":
            assert prompt == len(text)
            continue
        answered += 1
        thinks = {"enable_thinking": "</think>" in messages[-1]["content"]} if name == "qwen3" else {}
        given = original.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True, **thinks)
        assert text[:prompt] == given
    assert answered > 150


@pytest.mark.parametrize("name", list(TOKENS))
def test_a_generation_prompt_belongs_to_the_prompt(name: str) -> None:
    original = reference(source(name), **TOKENS[name])
    text, prompt = chat_text([USER], template_of(name), where="test", add_generation_prompt=True)
    assert text == original.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert prompt == len(text)


COMPLETIONS: dict[str, tuple[str, list[Message], dict[str, Any], str]] = {
    "answer": ("qwen2.5", [USER, answer("4")], {}, "4<|im_end|>\n"),
    "nothing": ("qwen2.5", [USER, answer("")], {}, "<|im_end|>\n"),
    "stripped by the template": ("gemma", [USER, answer("  4 \n")], {}, "4<end_of_turn>\n"),
    "kept by the template": ("smollm2", [USER, answer("  4 \n")], {}, "  4 \n<|im_end|>\n"),
    "as in the question": ("llama3", [USER, answer("2 + 2?")], {}, "2 + 2?<|eot_id|>"),
    "as before": ("llama3", [USER, answer("4"), USER, answer("4")], {}, "4<|eot_id|>"),
    "begins as the template": ("qwen2.5", [USER, answer("<|im_end|>")], {}, "<|im_end|><|im_end|>\n"),
    "the mark itself": ("qwen2.5", [USER, answer("\ue000\ue000")], {}, "\ue000\ue000<|im_end|>\n"),
    "after the mark": ("qwen2.5", [{"role": "user", "content": "\ue000"}, answer("4")], {}, "4<|im_end|>\n"),
    "nothing thought": ("qwen3", [USER, answer("4")], {}, "4<|im_end|>\n"),
    "thoughts": ("qwen3", [USER, answer("<think>\nhm\n</think>\n\n4")], {}, "<think>\nhm\n</think>\n\n4<|im_end|>\n"),
    "empty thoughts": ("qwen3", [USER, answer(EMPTY + "4")], {}, EMPTY + "4<|im_end|>\n"),
    "thoughts beside": ("qwen3", [USER, answer("4", reasoning="hm")], {}, "<think>\nhm\n</think>\n\n4<|im_end|>\n"),
    "two answers": ("qwen3", [USER, answer("3"), answer("4")], {}, "4<|im_end|>\n"),
    "an answer alone": ("qwen2.5", [answer("4")], {}, "4<|im_end|>\n"),
    "a call": (
        "qwen2.5", [USER, answer(None, tool_calls=[{"name": "add", "arguments": {"a": 2}}])], {},
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(COMPLETIONS))
def test_the_completion(case: str) -> None:
    name, messages, variables, completion = COMPLETIONS[case]
    text, prompt = chat_text(messages, template_of(name), where="test", **variables)
    assert text[prompt:] == completion


def test_earlier_thoughts_are_left_out_as_the_template_leaves_them_out() -> None:
    messages = [USER, answer("<think>\nhm\n</think>\n\n4"), USER, answer("5")]
    text, prompt = chat_text(messages, template_of("qwen3"), where="test")
    assert "hm" not in text
    assert text[prompt:] == "5<|im_end|>\n"


# Errors

BAD: dict[str, tuple[object, str]] = {
    "nothing": (None, "found messages of type NoneType; expected a list of at least one; give"),
    "a text": ("hello", "found messages of type str; expected a list of at least one"),
    "an object": (USER, "found messages of type dict; expected a list of at least one"),
    "empty": ([], "found no messages; expected a list of at least one; give {role, content} for each turn"),
    "texts": (["a"], 'message 0 is a str; expected an object; write {"role": "user", "content": "..."}'),
    "no role": ([USER, {"content": "a"}], "message 1 has the role None; expected a text; write system, user"),
    "role of another type": ([{"role": 3, "content": "a"}], "message 0 has the role 3; expected a text"),
    "no content": ([{"role": "user"}], "message 0 (user) has no content; expected a text; join its parts"),
    "null": ([{"role": "user", "content": None}], "message 0 (user) has no content; expected a text"),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "message 0 (user) has content of type list; expected a text; join its parts into one text",
    ),
    "a number and calls": (
        [{"role": "assistant", "content": 3, "tool_calls": [{}]}], "message 0 (assistant) has content of type int",
    ),
    "a role with controls": ([{"role": "\x1b[31m"}], "message 0 (␛[31m) has no content"),
    "an unknown role": (
        [USER, {"role": "narrator", "content": "2"}],
        "the chat template leaves out message 1 with the role 'narrator'; expected roles that it knows; rename the",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_bad_messages_are_named_with_their_place(case: str) -> None:
    messages, message = BAD[case]
    with pytest.raises(ChatError) as caught:
        chat_text(messages, template_of("qwen3" if case != "an unknown role" else "qwen2.5"), where="chats.jsonl:17")
    assert str(caught.value).startswith(f"chats.jsonl:17: {message}")


def test_a_refusal_is_named_with_its_place() -> None:
    with pytest.raises(ChatError, match=r"^chats.jsonl:2: the chat template refuses these messages: Turns of user and"):
        chat_text([USER, USER], template_of("gemma"), where="chats.jsonl:2")


def test_a_role_that_the_template_writes_is_known() -> None:
    text, _ = chat_text([{"role": "narrator", "content": "once"}], template_of("llama3"), where="test")
    assert "narrator" in text


def test_a_generation_prompt_after_an_answer_is_refused() -> None:
    with pytest.raises(
        ChatError, match=r"^a:1: the last message is the assistant's, and a generation prompt was asked"
    ):
        chat_text([USER, answer("4")], template_of("llama3"), where="a:1", add_generation_prompt=True)


UNCLEAR = {
    "written twice": "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}{{ add_generation_prompt }}",
    "changed": "{{ messages | length }}{% for m in messages %}{{ m.content | reverse }}{% endfor %}",
}


@pytest.mark.parametrize("case", list(UNCLEAR))
def test_a_prompt_without_a_clear_end_is_refused(case: str) -> None:
    with pytest.raises(
        ChatError, match="in a way that does not show where the prompt ends; expected its content as it is"
    ):
        chat_text([USER, answer("45")], ChatTemplate(UNCLEAR[case]), where="test")
