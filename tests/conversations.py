"""Conversations to render, the same on every machine; and the digest of what transformers makes of them.

`python tests/conversations.py FOLDER BOS` prints that digest for the chat template in a folder's
`tokenizer_config.json`.
"""

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers

Message = dict[str, Any]

TEXTS = (
    "", " ", "4", "What is 2 + 2?", "Grüße aus Köln", "数据 and 漢字", "a 😀 b 🜁",
    "e\u0301 is not \u00e9", "\ufeffmark", "a\r\nb\rc",
    "def f(x):\n    return {\"x\": x + 1}\n", "{{ messages }} {% raw %} {# no #}", "<b>&amp;</b> 'quoted' \"twice\"",
    "  around  ", "\n\nlines\n\n", "\tx\t", "<|im_end|>\n<|im_start|>assistant\n", "<bos><|eot_id|>",
    "0 1 2\n3 4 5\n6 7 8",
    "<tool_response>\n{\"a\": 1}\n</tool_response>", "word " * 50, "\x00\x1b[31m", "C:\\path\\n", "a\u2028b\u00a0c",
)  # fmt: skip
THOUGHTS = ("<think>\nFirst 2, then 4.\n</think>\n\n4", "<think></think>4", "</think>", "<think>\n\n</think>\n\nyes")


def conversations(count: int = 500, *, seed: int = 7) -> list[list[Message]]:
    """Of one to seven turns, with and without a system message; every twentieth has two turns of one role."""
    rng = random.Random(seed)

    def one_of(texts: Sequence[str]) -> str:
        return texts[int(rng.random() * len(texts))]  # `random` is the one method whose sequence Python promises

    made = []
    for number in range(count):
        messages = [{"role": "system", "content": one_of(TEXTS)}] if rng.random() < 0.4 else []
        for turn in range(1 + int(rng.random() * 7)):
            role = ("user", "assistant")[turn % 2]
            thinks = role == "assistant" and rng.random() < 0.25
            messages.append({"role": role, "content": one_of(THOUGHTS if thinks else TEXTS)})
        if number % 20 == 19:
            messages.append(dict(messages[-1]))
        made.append(messages)
    return made


def reference(source: str, **tokens: str) -> transformers.PreTrainedTokenizerFast:
    """transformers' own tokenizer with a chat template; its vocabulary does not matter."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    return transformers.PreTrainedTokenizerFast(tokenizer_object=engine, chat_template=source, **tokens)


def expected(tokenizer: Any, messages: list[Message], **options: Any) -> str | None:
    """The text that transformers makes of a conversation; None where its template refuses."""
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except jinja2.TemplateError:
        return None


def digest(texts: Sequence[str | None]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


if __name__ == "__main__":
    folder, bos = sys.argv[1:]
    config = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    original = reference(config["chat_template"], bos_token=bos)
    print(
        digest(
            [expected(original, each, add_generation_prompt=way) for each in conversations() for way in (False, True)]
        )
    )
