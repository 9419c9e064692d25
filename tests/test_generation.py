"""Generation against torch's own `generate`, its step activations against one forward pass, and its memory."""

import dataclasses
from pathlib import Path
from typing import Any

import family_configs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches_of_segments import relative_error
from flax import nnx

from extract.models import Model, ModelError, Tap, load_model
from extract.models import generate as generate_module
from extract.models.cache import cache_bytes, generation_bytes
from extract.models.generate import Generated, generate
from extract.models.sampling import Sampling

torch = pytest.importorskip("torch", reason="NOT CHECKED: torch is not installed here, and these tests compare with it")
import torch_reference  # noqa: E402  needs torch

BASE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 96, "hidden_size": 64,
    "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
    "initializer_range": 0.1,  # a weaker model repeats one token for ever, and hides what is wrong
}  # fmt: skip
CONFIGS = {
    "full": BASE,
    "windows_smaller_than_prompts": BASE | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
}
LENGTHS = (5, 23, 1, 40)
NEW = 40
TAPS = [Tap("embed", None), Tap("resid_post", 0), Tap("mlp_post", 2), Tap("resid_post", 2), Tap("final_norm", None)]

Case = tuple[Any, Model]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A random model, as torch has it and as it is here."""
    folder = tmp_path_factory.mktemp(request.param)
    return torch_reference.random_model(CONFIGS[request.param], folder), load_model(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    torch_reference.random_model(BASE, folder)
    return load_model(folder)


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 96, length) for length in LENGTHS]


def torch_tokens(
    reference: Any, prompts: list[np.ndarray], stop: list[int] | None = None, *, new: int = NEW
) -> list[list[int]]:
    """Greedy completions of a left-padded batch, up to and with the first stop token."""
    width = max(map(len, prompts))
    ids, mask = np.zeros((len(prompts), width), np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    found = reference.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=new, do_sample=False, pad_token_id=0,
        eos_token_id=stop,
    )  # fmt: skip
    rows = [row[width:].tolist() for row in found]
    ends = [next((place + 1 for place, token in enumerate(row) if token in (stop or [])), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def as_lists(found: Generated) -> list[list[int]]:
    return [row.tolist() for row in found.tokens]


# --- against torch ---


def test_greedy_tokens_are_those_of_torch(case: Case, prompts: list[np.ndarray]) -> None:
    reference, ours = case
    expected = torch_tokens(reference, prompts)
    found = generate(ours, prompts, max_tokens=NEW)
    assert as_lists(found) == expected
    assert found.finish == ("length",) * 4
    assert min(len(set(row)) for row in expected) > 15, "the model says more than one word"


LLAMA3 = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | family_configs.LLAMA3}
LIVELY = {"initializer_range": 0.1, "tie_word_embeddings": False}
FAMILIES = {
    "qwen3": family_configs.QWEN3 | LIVELY,
    "llama3": family_configs.LLAMA | LLAMA3,
    "yarn beyond the length that is said": family_configs.QWEN2
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
    | {"max_position_embeddings": 32, **LIVELY},
    "mistral, a window": family_configs.MISTRAL | {"sliding_window": 7},
    "gemma": family_configs.GEMMA | LIVELY,
    "gemma2, soft caps and windows": family_configs.GEMMA2
    | {"sliding_window": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3, two ropes": family_configs.GEMMA3,
    "gpt2": family_configs.GPT2 | LIVELY,
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_every_family(family: str, prompts: list[np.ndarray], tmp_path: Path) -> None:
    reference = torch_reference.random_model(FAMILIES[family], tmp_path)
    expected = torch_tokens(reference, prompts, new=20)
    assert as_lists(generate(load_model(tmp_path), prompts, max_tokens=20)) == expected
    assert max(len(set(row)) for row in expected) > 3


def test_rows_end_at_any_of_several_stop_tokens_as_in_torch(case: Case, prompts: list[np.ndarray]) -> None:
    reference, ours = case
    free = torch_tokens(reference, prompts)
    stop = [free[0][3], free[1][30]]
    expected = torch_tokens(reference, prompts, stop)
    found = generate(ours, prompts, max_tokens=NEW, stop=stop)
    assert as_lists(found) == expected
    assert found.finish == tuple("stop" if row[-1] in stop else "length" for row in expected)
    assert len({len(row) for row in expected}) > 1


def test_the_loop_ends_when_all_rows_have_stopped(model: Model, prompts: list[np.ndarray], monkeypatch: Any) -> None:
    calls = []
    advance = generate_module._advance
    monkeypatch.setattr(generate_module, "_advance", lambda *a, **k: calls.append(1) or advance(*a, **k))
    monkeypatch.setattr(generate_module, "STEPS_AT_ONCE", 4)
    first = [row[0] for row in as_lists(generate(model, prompts, max_tokens=NEW))]
    assert len(calls) == 10
    calls.clear()
    found = generate(model, prompts, max_tokens=NEW, stop=first)
    assert (as_lists(found), calls) == ([[token] for token in first], [])


# --- rows and batches ---


SAMPLED = Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=7)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_row_has_the_same_tokens_whatever_else_is_in_the_batch(
    model: Model, prompts: list[np.ndarray], sampling: Sampling
) -> None:
    ids = np.array([11, 22, 33, 44], np.uint32)
    together = as_lists(generate(model, prompts, max_tokens=NEW, sampling=sampling, row_ids=ids))
    for order in ([2], [3, 1], [1, 0, 3, 2]):
        some = generate(
            model,
            [prompts[row] for row in order],
            max_tokens=NEW,
            sampling=sampling,
            row_ids=ids[order],
            padded=(5, 64),
        )
        assert as_lists(some) == [together[row] for row in order]


def test_in_batches_of_one_shape_a_row_has_the_same_bits(model: Model, prompts: list[np.ndarray]) -> None:
    tap = Tap("final_norm", None)
    alone = generate(model, prompts[:1], max_tokens=NEW, taps=[tap], padded=(4, 48)).activations[tap]
    last = generate(model, prompts[::-1], max_tokens=NEW, taps=[tap], padded=(4, 48)).activations[tap]
    np.testing.assert_array_equal(alone[0], last[3])


def test_seeds_reproduce_and_differ(model: Model, prompts: list[np.ndarray]) -> None:
    first, again, other = (
        as_lists(generate(model, prompts, max_tokens=NEW, sampling=dataclasses.replace(SAMPLED, seed=seed)))
        for seed in (3, 3, 4)
    )
    assert first == again
    assert all(row != changed for row, changed in zip(first, other, strict=True))


def test_equal_prompts_differ_by_their_row_id_alone(model: Model, prompts: list[np.ndarray]) -> None:
    ids = np.array([5, 6, 5], np.uint32)
    same = [prompts[3]] * 3
    found = as_lists(generate(model, same, max_tokens=NEW, sampling=SAMPLED, row_ids=ids, padded=(4, 40)))
    assert found[0] == found[2] != found[1]


def test_the_likeliest_of_one_is_greedy(model: Model, prompts: list[np.ndarray]) -> None:
    drawn = generate(model, prompts, max_tokens=NEW, sampling=dataclasses.replace(SAMPLED, top_k=1))
    cold = generate(model, prompts, max_tokens=NEW, sampling=dataclasses.replace(SAMPLED, temperature=1e-40))
    assert as_lists(drawn) == as_lists(cold) == as_lists(generate(model, prompts, max_tokens=NEW))


# --- step activations ---


def test_step_activations_equal_one_forward_pass(case: Case, prompts: list[np.ndarray]) -> None:
    _, ours = case
    found = generate(ours, prompts, max_tokens=NEW, taps=TAPS)
    ids, used = np.zeros((4, max(LENGTHS) + NEW), np.int32), np.zeros((4, max(LENGTHS) + NEW), np.int32)
    for row, (prompt, tokens) in enumerate(zip(prompts, found.tokens, strict=True)):
        ids[row, : len(prompt) + NEW], used[row, : len(prompt) + NEW] = np.concatenate([prompt, tokens]), 1
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    one_pass = jax.jit(lambda params, *batch: nnx.merge(ours.graph, params).activations(*batch, TAPS))
    expected = one_pass(ours.params, ids, used, places)
    for row, (prompt, tokens) in enumerate(zip(prompts, found.tokens, strict=True)):
        for tap in TAPS:
            steps = np.asarray(expected[tap])[row, len(prompt) - 1 : len(prompt) + len(tokens) - 1]
            ours_now = np.asarray(found.activations[tap])[row]
            assert relative_error(ours_now.reshape(-1), steps.reshape(-1)) <= 1e-5
            assert relative_error(ours_now, steps).max() <= 2e-5  # of a token whose terms nearly cancel


def test_activations_end_with_the_longest_row(model: Model, prompts: list[np.ndarray]) -> None:
    stop = [row[2] for row in as_lists(generate(model, prompts[:2], max_tokens=NEW))]
    found = generate(model, prompts[:2], max_tokens=NEW, stop=stop, taps=[Tap("resid_post", 1)])
    assert found.activations[Tap("resid_post", 1)].shape == (2, max(map(len, found.tokens)), 64)


def test_bfloat16_follows_its_own_forward_pass(tmp_path: Path, prompts: list[np.ndarray]) -> None:
    torch_reference.random_model(BASE, tmp_path)
    rounded = load_model(tmp_path, dtype="bfloat16")
    found = generate(rounded, prompts[1:2], max_tokens=12, taps=[Tap("final_norm", None)])
    assert found.activations[Tap("final_norm", None)].dtype == jnp.bfloat16
    ids = np.concatenate([prompts[1], found.tokens[0]])[None]
    logits = np.asarray(rounded.apply(rounded.params, ids))[0, len(prompts[1]) - 1 : -1]
    chosen = np.take_along_axis(logits, found.tokens[0][:, None], axis=1)[:, 0]
    assert (logits.max(axis=1) - chosen).max() <= 0.02 * np.abs(logits).max()


# --- memory ---


@pytest.mark.sampled(3)
@pytest.mark.parametrize("taps", [(), (Tap("mlp_post", 1), Tap("resid_post", 1))], ids=["plain", "with_taps"])
@pytest.mark.parametrize("shape", [(2, 8), (8, 64)])
def test_compiled_memory_stays_below_the_bound(model: Model, shape: tuple[int, int], taps: tuple[Tap, ...]) -> None:
    batch, width = shape
    most = {"max_tokens": 32, "taps": taps}
    rules = generate_module._Rules(SAMPLED.draws(np.arange(batch, dtype=np.uint32)), jnp.arange(2))
    lengths = np.full(batch, width, np.int32)
    prefill = (model.graph, model.params, np.zeros(shape, np.int32), lengths, rules)
    begun = generate_module._begin.lower(*prefill, **most).compile().memory_analysis()
    state = jax.eval_shape(
        lambda params: generate_module._begin(model.graph, params, *prefill[2:], **most), model.params
    )
    arguments = (model.graph, model.params, state, lengths, rules, jnp.int32(9))
    advanced = generate_module._advance.lower(*arguments, taps=taps).compile().memory_analysis()
    needed = max(
        begun.output_size_in_bytes + begun.temp_size_in_bytes,
        advanced.output_size_in_bytes + advanced.temp_size_in_bytes,
    )
    cache = cache_bytes(model.config, batch=batch, slots=width + 32, itemsize=4)
    bound = generation_bytes(model.config, batch=batch, prompt_tokens=width, max_tokens=32, itemsize=4, taps=taps)
    assert cache < needed <= bound <= 4 * needed
    # Cache and kept activations are changed in place: the loop holds no second copy of them.
    assert advanced.alias_size_in_bytes >= cache
    assert advanced.temp_size_in_bytes < cache / 2 + 12 * batch * model.config.vocab_size * 4


def test_cache_bytes_are_those_of_the_arrays(model: Model, prompts: list[np.ndarray]) -> None:
    token_ids, lengths = generate_module._right_aligned(prompts, (4, 40))
    rules = generate_module._Rules(None, jnp.zeros(0, jnp.int32))
    state = generate_module._begin(model.graph, model.params, token_ids, lengths, rules, max_tokens=3, taps=())
    found = sum(array.nbytes for array in jax.tree.leaves(state.cache))
    assert found == cache_bytes(model.config, batch=4, slots=43, itemsize=4)


# --- what is refused ---


REFUSED = {
    "no tokens asked for": ({"max_tokens": 0}, r"max_tokens is 0; expected at least 1; pass for example 50"),
    "empty prompt": ({"prompts": [[1], []]}, r"prompt 1 is empty; expected at least one token; drop it"),
    "no prompts": ({"prompts": []}, r"found no prompts; expected at least one; pass a list of token ids"),
    "token of another model": ({"prompts": [[95, 96]]}, r"prompt 0 has token 96; expected 0 to 95; use the tokenizer"),
    "negative token": ({"prompts": [[3, -1]]}, r"prompt 0 has token -1; expected 0 to 95"),
    "too long": ({"prompts": [[1] * 129]}, r"prompt 0 has 129 tokens, with 3 more that is over the 128 that"),
    "no room": ({"prompts": [[1] * 126]}, r"has 126 tokens, with 3 more .* shorten the prompt or lower max_tokens"),
    "unknown stop token": ({"stop": [2, 96]}, r"found stop token 96; expected 0 to 95; give ids of this model"),
    "padded too small": ({"padded": (1, 1)}, r"padded is \(1, 1\), but there are 1 prompts of up to 2 tokens"),
    "layer that does not exist": ({"taps": [Tap("resid_post", 3)]}, r"layer 3 does not exist: the model has 3 layers"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_generated_is_refused(model: Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        generate(model, **{"prompts": [[1, 2]], "max_tokens": 3} | arguments)


def test_as_many_tokens_as_the_model_was_made_for_are_generated(model: Model) -> None:
    assert len(generate(model, [[1] * 126], max_tokens=2).tokens[0]) == 2


def test_problems_are_reported_together(model: Model) -> None:
    with pytest.raises(ModelError, match=r"(?s)max_tokens is -1.*stop token 99.*prompt 0 is empty"):
        generate(model, [[]], max_tokens=-1, stop=[99])


def test_logits_that_are_no_numbers_are_refused(model: Model) -> None:
    params = jax.tree.map(lambda leaf: leaf, model.params)
    params["final_norm"]["weight"][...] = jnp.full(64, jnp.nan)
    with pytest.raises(ModelError, match=r"found logits of .* that are not finite; expected numbers; look for weights"):
        generate(dataclasses.replace(model, params=params), [[1, 2]], max_tokens=3)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sorted"])
def test_the_bound_holds_for_a_wide_vocabulary(tmp_path: Path, sampling: Sampling) -> None:
    """Where logits are nearly all there is: top_k and top_p sort them."""
    torch_reference.random_model(BASE | {"vocab_size": 30_000, "hidden_size": 8, "head_dim": 8}, tmp_path)
    wide, rules = load_model(tmp_path), generate_module._Rules(
        sampling.draws(np.arange(8, dtype=np.uint32)), jnp.arange(2)
    )  # fmt: skip
    begin = (wide.graph, wide.params, np.zeros((8, 4), np.int32), np.full(8, 4, np.int32), rules)
    memory = generate_module._begin.lower(*begin, max_tokens=8, taps=()).compile().memory_analysis()
    bound = generation_bytes(wide.config, batch=8, prompt_tokens=4, max_tokens=8, itemsize=4)
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes <= bound


def test_row_ids_are_one_for_each_prompt(model: Model, prompts: list[np.ndarray]) -> None:
    with pytest.raises(ModelError, match="found 1 row_ids for 4 prompts; expected one for each"):
        generate(model, prompts, max_tokens=2, sampling=SAMPLED, row_ids=np.zeros(1, np.uint32))
