"""Chat templates against transformers' `apply_chat_template`, and everything that can be wrong with them."""

import dataclasses
import datetime as dt
import json
import pickle
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
import transformers
from conversations import Message, conversations, digest, expected, reference

from actstore.errors import InputError, UnknownNameError
from extract import sandbox
from extract.chat import ChatTemplate, ChatTemplateError, load_chat_template
from extract.messages import ChatError
from extract.named import model_folder
from extract.qwen_tokenizer import ADDED, qwen_tokenizer_folder
from extract.sources import Documents
from extract.tokenising import tokenise
from extract.tokens import load_tokenizer

FOLDER = Path(__file__).parent / "chat_templates"
TOKENS = {
    "qwen2.5": {"eos_token": "<|im_end|>"},
    "qwen3": {"eos_token": "<|im_end|>"},
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<end_of_turn>"},
}
PUBLISHED = {  # see the README of the folder: what the published templates write with transformers
    "llama3": "387f1ba55d85b7c86d4e491e6f317e3ebae515f36ff4ade217e7e5e32a1271c4",
    "gemma": "1cff296cd2ed2a86b266e7f59e689cf2329fb256c8fb510b7a1ca29d4a5af97d",
}
# What published templates use beyond the above
FEATURES = r"""
    {% set seen = namespace(count=0) %}
    {% for message in messages %}
        {% if message.role == "skip" %}
            {% continue %}
        {% endif %}
        {% if message.role == "stop" %}
            {% break %}
        {% endif %}
        {% set seen.count = seen.count + 1 %}
        {% generation %}
            {% set inner = "inside" %}
            {{ message.content }} {{ inner }} {{ seen.count }}
        {% endgeneration %}
        {{ inner is defined }} {{ message.reasoning_content }} {{ message.thinking }} {{ message.nothing is defined }}
    {% endfor %}
    {{ tools | tojson }} {{ tools | tojson(indent=2) }} {{ tools | tojson(sort_keys=true, separators=(",", ":")) }}
    {{ dict(a=1) }} {{ dict.fromkeys("ab", 1) }} {{ documents is none }} {{ undefined_thing }} {{ pad_token }}
    {{ tools[0].items() | list }} {{ namespace({"a": 1}, b=2).b }} {{ flag }}{{ strftime_now("%Y") | length }}
"""
TOOLS = [{"type": "function", "z": "<é>", "a": [1, 2.5, None, True]}]
TURNS: list[Message] = [
    {"role": "user", "content": "a", "nothing": None},
    {"role": "skip", "content": "b"},
    {"role": "assistant", "content": "c", "thinking": "hm"},
    {"role": "assistant", "content": "d", "reasoning": "well", "reasoning_content": None},
    {"role": "stop", "content": "e"},
    {"role": "user", "content": "f"},
]


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def rendered(template: ChatTemplate, messages: list[Message], **options: Any) -> str | None:
    """The text; None where the template refuses."""
    try:
        return template.render(messages, **options)
    except ChatError:
        return None


@pytest.mark.parametrize("name", list(TOKENS))
def test_five_hundred_conversations_are_those_of_transformers(name: str) -> None:
    template, original = ChatTemplate(source(name), TOKENS[name]), reference(source(name), **TOKENS[name])
    texts = []
    for messages in conversations(500):
        for way in (False, True):
            texts.append(rendered(template, messages, add_generation_prompt=way))
            assert texts[-1] == expected(original, messages, add_generation_prompt=way), messages
    assert sum(text is None for text in texts) == (50 if name == "gemma" else 0)
    assert digest(texts) == PUBLISHED.get(name, digest(texts))


def test_meta_another_text_would_be_noticed() -> None:
    changed = {
        "llama3": source("llama3").replace(".strip()", ""),
        "gemma": source("gemma").replace(" | trim", ""),
    }
    for name, text in changed.items():
        template = ChatTemplate(text, TOKENS[name])
        texts = [
            rendered(template, each, add_generation_prompt=way) for each in conversations() for way in (False, True)
        ]
        assert digest(texts) != PUBLISHED[name]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_tools_and_thoughts_are_those_of_transformers(name: str) -> None:
    template, original = ChatTemplate(source(name), TOKENS[name]), reference(source(name), **TOKENS[name])
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "é<"}}}
    messages: list[Message] = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Use the tool."},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "four"},
        {"role": "assistant", "content": "It is 4.", "thinking": "Say it."},
    ]
    for options in ({}, {"tools": TOOLS}, {"enable_thinking": False}, {"add_generation_prompt": True}):
        for count in (1, 3, 4, 5):
            found = rendered(template, messages[:count], **options)
            assert found == expected(original, messages[:count], **options)


def test_the_dialect_is_that_of_transformers() -> None:
    original = reference(FEATURES, pad_token="<pad>")
    found = ChatTemplate(FEATURES, {"pad_token": "<pad>"}).render(TURNS, tools=TOOLS, flag="x")
    assert found == expected(original, TURNS, tools=TOOLS, flag="x")
    assert "<é>" in found
    assert "hm hm" in found
    assert "well well" in found


def test_meta_another_dialect_would_be_noticed() -> None:
    plain = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    text = r"{% if true %}" + "\n  a\n" + r"    {% endif %}" + "{{ '<' | tojson }}"
    assert plain.from_string(text).render() != ChatTemplate(text).render(TURNS) == expected(reference(text), TURNS)


def test_variables_may_replace_special_tokens() -> None:
    text = "{{ bos_token }}{{ messages[0].content }}"
    original = reference(text, bos_token="<s>")
    assert ChatTemplate(text, {"bos_token": "<s>"}).render(TURNS, bos_token="<b>") == "<b>a"
    assert expected(original, TURNS, bos_token="<b>") == "<b>a"


# Token ids


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", list(TOKENS))
def test_token_ids_of_five_hundred_chats_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """As `extract` reads them: Qwen's with its own tokenizer, others with the tiny model's and their special tokens."""
    own = name in ADDED
    made = qwen_tokenizer_folder(name, cache=tmp_path / "cache") if own else model_folder("tiny-qwen2")
    engine = tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))
    engine.add_special_tokens([*TOKENS[name].values(), "<|eot_id|>", "<start_of_turn>"] * (not own))
    folder = saved(tmp_path, engine, chat_template=source(name), **TOKENS[name])
    chats = {str(number): messages for number, messages in enumerate(conversations(500))}
    documents = Documents([{"id": number, "messages": each} for number, each in chats.items()], on_error="skip")
    table = tokenise(documents, load_tokenizer(folder))
    original = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    marks = {engine.token_to_id(token) for token in TOKENS[name].values()}
    for number, first, stop in zip(table.ids, table.token_offsets[:-1], table.token_offsets[1:], strict=True):
        ids = table.token_id[first:stop].tolist()
        assert ids == original.apply_chat_template(chats[number], return_dict=False)
        assert set(ids) & marks
    refused = sum(expected(original, messages) is None for messages in chats.values())
    unclear = 1 if name == "qwen3" else 0  # two answers in a row, both of thoughts: it rewrites them
    assert refused == (25 if name == "gemma" else 0)
    assert (len(table.ids), documents.problems.total()) == (500 - refused - unclear, refused + unclear)


# Where templates are found


def saved(folder: Path, engine: tokenizers.Tokenizer | None = None, **config: Any) -> Path:
    engine = engine or tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
PLACES: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "text": ({"chat_template": "C{{ bos_token }}", "bos_token": "<s>"}, {}, "default"),
    "an added token": ({"chat_template": "C{{ bos_token }}", "bos_token": {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "__type": "AddedToken"}}, {}, "default"),  # noqa: E501
    "null": ({"chat_template": "C{{ bos_token }}", "bos_token": None, "add_bos_token": True}, {}, "default"),
    "a token of its own": ({"chat_template": "C{{ image_token }}", "image_token": "<i>"}, {}, "default"),
    "several": ({"chat_template": "{{ a_token }}", "extra_special_tokens": {"a_token": "<a>"}}, {}, "default"),
    "list": ({"chat_template": NAMED}, {}, "default"),
    "another of a list": ({"chat_template": NAMED}, {}, "tool_use"),
    "file": ({}, {"chat_template.jinja": "F{{ eos_token }}"}, "default"),
    "file and text": ({"chat_template": "C"}, {"chat_template.jinja": "Fé\n"}, "default"),
    "two files": ({}, {"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "R"}, "rag"),
    "older map": ({"chat_template": "C{{ eos_token }}"}, {"special_tokens_map.json": '{"eos_token": {"content": "</s>"}}'}, "default"),  # noqa: E501
    "newer than the map": ({"chat_template": "C{{ eos_token }}", "eos_token": "<e>", "added_tokens_decoder": {}}, {"special_tokens_map.json": '{"eos_token": "</s>"}'}, "default"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("case", list(PLACES))
def test_a_template_is_found_as_transformers_finds_it(tmp_path: Path, case: str) -> None:
    config, files, name = PLACES[case]
    folder = saved(tmp_path, **config)
    for path, text in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    original = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    template = load_chat_template(folder, name=name)
    assert template is not None
    named = {} if name == "default" else {"chat_template": name}
    assert template.render(TURNS) == expected(original, TURNS, **named)


def test_a_base_model_has_none(tmp_path: Path) -> None:
    assert load_chat_template(saved(tmp_path)) is None
    assert load_chat_template(tmp_path / "nothing") is None
    assert load_chat_template(model_folder("tiny-qwen2")) is None


BROKEN: dict[str, tuple[str, type[InputError], str]] = {
    "no JSON": ("{", InputError, r"tokenizer_config.json is not JSON \(.*\); expected an object; fetch the file again"),
    "no object": ("[]", InputError, r"tokenizer_config.json holds a list; expected a JSON object; fetch the"),
    "a number": ('{"chat_template": 3}', ChatTemplateError, "chat_template that is neither a text nor a list of named"),
    "no name": ('{"chat_template": [{"template": ""}]}', ChatTemplateError, "neither a text nor a list of named texts"),
    "no text": ('{"chat_template": [{"template": 1, "name": "a"}]}', ChatTemplateError, "neither a text nor a list"),
    "a token": (
        '{"chat_template": "", "bos_token": 3}', InputError,
        r"tokenizer_config.json has bos_token 3; expected a text, or null; mend the file, or fetch it again",
    ),
    "other name": (
        '{"chat_template": [{"template": "", "name": "b"}, {"template": "", "name": "a"}]}', UnknownNameError,
        r"has no chat template 'default'; expected a or b; give the name of one",
    ),
    "syntax": (
        '{"chat_template": "a\\n{% if %}"}', ChatTemplateError,
        (
            r"the chat template of .*tokenizer_config.json is no Jinja template \(line 2: Expected an .*\); "
            r"expected one as transformers reads it; mend it, or fetch it again"
        ),
    ),
    "syntax of Python": ('{"chat_template": "{% break %}"}', ChatTemplateError, r"no Jinja template \('break' outside"),
    "no such filter": ('{"chat_template": "{{ 1 | nothing }}"}', ChatTemplateError, "1: No filter named 'nothing'"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_template_is_refused_when_it_is_loaded(tmp_path: Path, case: str) -> None:
    text, kind, message = BROKEN[case]
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(kind, match=message) as caught:
        load_chat_template(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"abc\xff")
    with pytest.raises(
        ChatTemplateError, match=r"chat_template.jinja is not UTF-8 \(byte 3\); expected a chat template"
    ):
        load_chat_template(tmp_path)


# What a template may not do

FORBIDDEN = {
    "inner workings": "{{ ''.__class__.__mro__ }}",
    "by a filter": "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).__mro__ }}",
    "by a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals of a function": "{{ raise_exception.__globals__.keys() }}",
    "a change of the messages": "{{ messages.append(1) }}",
    "a change of a message": "{{ messages[0].update({'role': 'x'}) }}",
    "a name with underscores": "{% set a = namespace() %}{% set a.__html__ = 1 %}",
    "a name with underscores at once": "{{ namespace(_a=1) }}",
    "a long range": "{% for a in range(100001) %}{% endfor %}",
    "a macro without end": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "a long text": "{% for a in range(1000) %}{{ 'x' * 100000 }}{% endfor %}",
}
ALLOWED_ELSEWHERE = ["inner workings", "by a format", "a change of the messages", "a change of a message"]


@pytest.mark.parametrize("case", list(FORBIDDEN))
def test_what_a_template_may_not_do(case: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(
        ChatTemplateError, match=r"^the chat template does what is not allowed: .*; expected a template"
    ):
        ChatTemplate(FORBIDDEN[case]).render(messages)
    assert messages == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("case", ALLOWED_ELSEWHERE)
def test_meta_without_the_sandbox_it_would_be_done(case: str) -> None:
    jinja2.Environment().from_string(FORBIDDEN[case]).render(messages=[{"role": "user"}])


def test_meta_the_bound_of_a_text_is_what_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% for a in range(10) %}ab{% endfor %}")
    assert template.render(TURNS) == "ab" * 10
    monkeypatch.setattr(sandbox, "MOST_CHARACTERS", 20)
    assert template.render(TURNS) == "ab" * 10
    monkeypatch.setattr(sandbox, "MOST_CHARACTERS", 19)
    with pytest.raises(ChatTemplateError, match="not allowed: more than 19 characters; expected"):
        template.render(TURNS)


def test_a_dictionary_has_no_methods_that_change_one() -> None:
    with pytest.raises(ChatError, match="has no attribute 'update'"):
        ChatTemplate("{{ dict.update(messages[0], {'role': 'x'}) }}").render(TURNS)


REFUSED: dict[str, tuple[str, str]] = {
    "refused": (
        "{{ raise_exception('Only one user\\nplease\\x1b[31m') }}",
        (
            "the chat template refuses these messages: Only one user⏎please␛[31m; expected messages as the model "
            "takes them; change or leave out these, or give another template"
        ),
    ),
    "undefined": (
        "{{ 'a' + nothing }}",
        (
            "the chat template asks for something that is not there: 'nothing' is undefined; expected it in "
            "the messages or among the variables; give it, or give another template"
        ),
    ),
    "wrong type": (
        "{{ messages[0].content + 1 }}",
        (
            'the chat template fails with these messages: TypeError: can only concatenate str (not "int") to str; '
            "expected messages as the model takes them; change or leave out these, or give another template"
        ),
    ),
    "no number": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "no file": ("{% include 'passwd' %}", "no loader for this environment specified"),
    "long words": ("{{ raise_exception('x' * 1000) }}", "x" * 199 + "…; expected messages"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_messages_that_a_template_does_not_take(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(ChatError) as caught:
        ChatTemplate(text).render([{"role": "user", "content": "a"}])
    assert message in str(caught.value)
    assert message == str(caught.value) or not message.startswith("the chat")


@pytest.mark.parametrize(
    ("value", "name"), [(Path(), "PosixPath"), ({1: "a"}, "dict"), ([b"a"], "bytes")], ids=["object", "key", "bytes"]
)
def test_values_that_are_not_of_json_are_refused(value: Any, name: str) -> None:
    message = f"hold a value of type {name}; expected values of JSON; turn it into text or numbers"
    with pytest.raises(ChatError, match=f"^the variables {message}"):
        ChatTemplate("").render(TURNS, tools=value)
    with pytest.raises(ChatError, match=f"^message 0 {message}"):
        ChatTemplate("").render([{"role": "user", "content": "a", "more": value}])


# Identity and time


def test_the_date_can_be_fixed() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=dt.datetime(2024, 7, 26))
    assert template.render(TURNS) == "26 Jul 2024"
    assert not template.reads_the_clock
    today = dataclasses.replace(template, now=None)
    before, found, after = dt.date.today(), today.render(TURNS), dt.date.today()
    assert found in {date.strftime("%d %b %Y") for date in (before, after)}
    assert today.reads_the_clock
    assert not ChatTemplate("{{ strftime_then }} strftime_now").reads_the_clock


def test_the_digest_is_that_of_what_writes_the_text() -> None:
    base = ChatTemplate("a", {"bos_token": "<s>", "eos_token": "</s>"})
    assert base.digest == ChatTemplate("a", {"eos_token": "</s>", "bos_token": "<s>"}, "elsewhere").digest
    others = [
        ChatTemplate("b", base.tokens),
        ChatTemplate("a", {"bos_token": "<s>"}),
        ChatTemplate("a", base.tokens, now=dt.datetime(2024, 1, 1)),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 4


def test_a_template_travels_to_other_processes() -> None:
    template = ChatTemplate(source("llama3"), TOKENS["llama3"])
    text = template.render(TURNS[:1])
    again = pickle.loads(pickle.dumps(template))
    assert again == template
    assert again.render(TURNS[:1]) == text
