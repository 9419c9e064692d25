"""The kernels of vendors beside the portable one, and who may choose them."""

import dataclasses
from functools import partial
from pathlib import Path

import family_configs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches_of_segments import relative_error

import actstore
import extract
from actstore.errors import InputError
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.verify import verify
from extract.forward import make_forward
from extract.loaded import load_model
from extract.loop import run
from extract.mesh import toward_host
from extract.models import ModelError, Tap
from extract.models.attention import AttentionRule, attend
from extract.models.families import family_of
from extract.models.kernels import KERNELS, attend_cudnn, attend_splash, check_kernel, default_kernel, kernel_of
from extract.planning import make_plan
from extract.sources import open_documents

TINY = Path(extract.__path__[0]) / "demo" / "tiny-qwen2"

RULES = {
    "all before it": AttentionRule(None, 64**-0.5),
    "a window": AttentionRule(40, 64**-0.5),
    "itself": AttentionRule(1, 64**-0.5),
    "another scale": AttentionRule(None, 0.3),
    "a soft cap": AttentionRule(40, 0.3, 2.0),
}
KERNEL_RULES = [
    *(pytest.param(partial(attend_splash, interpret=True), rule, id=f"splash, {name}") for name, rule in RULES.items()),
    *(
        pytest.param(partial(attend_cudnn, implementation="xla"), rule, id=f"the call of cudnn, {name}")
        for name, rule in RULES.items()
        if rule.softcap is None
    ),
]


def inputs(length: int, *, heads: int, kv_heads: int, dtype: str = "float32") -> list[jax.Array]:
    """Queries, keys, values and the segments of a packed batch, padding at the end."""
    rng = np.random.default_rng(length)
    states = [rng.normal(size=(2, length, count, 64)) for count in (heads, kv_heads, kv_heads)]
    segments = np.sort(rng.integers(1, 4, (2, length)), axis=1)
    segments[:, length - 3 :] = 0
    return [*(jnp.asarray(values, dtype) for values in states), jnp.asarray(segments)]


@pytest.mark.sampled(9)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)], ids=["grouped", "one key head"])
@pytest.mark.parametrize("length", [5, 200])
@pytest.mark.parametrize(("kernel", "rule"), KERNEL_RULES)
def test_kernels_give_what_the_portable_one_gives(kernel, rule, length, heads, kv_heads):
    arguments = inputs(length, heads=heads, kv_heads=kv_heads)
    expected = np.asarray(jax.jit(partial(attend, rule=rule))(*arguments))
    found = np.asarray(jax.jit(partial(kernel, rule=rule))(*arguments))
    used = np.asarray(arguments[3]) > 0  # rows of padding are garbage
    np.testing.assert_allclose(found[used], expected[used], atol=1e-5)


@pytest.mark.parametrize("kernel", [partial(attend_splash, interpret=True)], ids=["splash"])
def test_bfloat16_stays_bfloat16(kernel):
    rule, arguments = RULES["a window"], inputs(150, heads=4, kv_heads=2, dtype="bfloat16")
    exact = np.asarray(attend(*(values.astype(jnp.float32) for values in arguments[:3]), arguments[3], rule=rule))
    used = np.asarray(arguments[3]) > 0
    errors = []
    for each in (kernel, attend):
        found = each(*arguments, rule=rule)
        assert found.dtype == jnp.bfloat16
        errors.append(np.abs(np.asarray(found, np.float32) - exact)[used].mean())
    assert errors[0] < 1.5 * errors[1]


def test_splash_never_holds_all_scores():
    """Of 4,096 tokens: the kernel's arrays are its blocks, so that memory grows with the length."""
    rule, length = RULES["all before it"], 4096
    states = [jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)] * 3
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(partial(attend_splash, rule=rule, interpret=True)).lower(*states, segments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * length * length * 4 / 2


SETTINGS = {"platform": "cpu", "dtype": "bfloat16"}
CONFIG = family_of(family_configs.GEMMA2).read_config(family_configs.GEMMA2)  # 2 key heads, soft caps
PLAIN = dataclasses.replace(CONFIG, attention_softcap=None)
REFUSED = {
    "unknown": ("flash", {}, "found attention 'flash'; expected one of chunked, splash, cudnn"),
    "no TPU": ("splash", {}, "found attention 'splash', which needs a TPU, on a machine whose devices are 'cpu'"),
    "no GPU": ("cudnn", {}, "found attention 'cudnn', which needs a GPU, on a machine whose devices are 'cpu'"),
    "float32": ("cudnn", {"platform": "gpu", "dtype": "float32"}, "found attention 'cudnn' for a model in float32"),
    "soft cap": (
        "cudnn", {"platform": "gpu", "config": CONFIG}, "found attention 'cudnn' for a model that caps its scores",
    ),
    "mesh": (
        "splash", {"platform": "tpu", "config": CONFIG, "model": 4},
        "found attention 'splash' for 2 key heads on a mesh whose axis model is 4; expected an axis that divides",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_a_kernel_that_cannot_be_used_is_refused(name, settings, message):
    with pytest.raises(ModelError, match=message):
        check_kernel(name, **(SETTINGS | settings))


HOPPER = {"platform": "gpu", "capability": 9.0, "dtype": "bfloat16", "config": dataclasses.replace(PLAIN, head_dim=64)}
DEFAULTS = {
    "Hopper": ({}, "cudnn"),
    "a CPU": ({"platform": "cpu", "capability": None}, "chunked"),
    "a TPU": ({"platform": "tpu", "capability": None}, "chunked"),
    "an older GPU": ({"capability": 7.5}, "chunked"),
    "a GPU of another maker": ({"capability": None}, "chunked"),
    "float32": ({"dtype": "float32"}, "chunked"),
    "a soft cap": ({"config": CONFIG}, "chunked"),
    "wide heads": ({"config": dataclasses.replace(PLAIN, head_dim=256)}, "chunked"),
    "odd heads": ({"config": dataclasses.replace(PLAIN, head_dim=20)}, "chunked"),
    "key heads that the mesh does not divide": ({"model": 4}, "chunked"),
}


@pytest.mark.parametrize(("changed", "kernel"), DEFAULTS.values(), ids=DEFAULTS)
def test_the_kernel_of_a_run_that_names_none(changed, kernel):
    assert default_kernel(**(HOPPER | changed)) == kernel


def test_kernels_by_their_names():
    for name, device in KERNELS.items():
        check_kernel(name, platform=device.lower(), dtype="bfloat16", config=PLAIN, model=2)
    kernels = [kernel_of(name, None, platform="cpu") for name in KERNELS]
    assert kernels == [attend, attend_splash, attend_cudnn]
    check_kernel("chunked", platform="cpu", dtype="float32", config=CONFIG, model=4)


def test_a_plan_says_which_kernel(monkeypatch):
    """It is refused before the model is read, and part of the fingerprint where it is not the portable one."""
    model, texts = load_model(TINY), open_documents("python-docs", limit=1)
    with pytest.raises(InputError, match="found attention 'splash', which needs a TPU"):
        make_plan("no folder", texts, attention="splash")
    with pytest.raises(InputError, match="attention is 'splash', but the model is loaded already with 'chunked'"):
        make_plan(TINY, texts, model=model, attention="splash")
    plain = make_plan(TINY, texts, model=model, attention="chunked").store
    other = make_plan(TINY, texts, model=dataclasses.replace(model, attention="splash")).store
    assert "attention" not in plain.provenance["model"]
    assert other.provenance["model"]["attention"] == "splash"
    assert other.fingerprint != plain.fingerprint


def test_the_portable_kernel_takes_longer_runs_of_rows_on_a_gpu():
    arguments = inputs(1100, heads=2, kv_heads=1)
    rule = RULES["a window"]
    there = kernel_of("chunked", None, platform="gpu")
    traced = [str(jax.make_jaxpr(partial(kernel, rule=rule))(*arguments)) for kernel in (there, attend)]
    assert [text.count("scan[") + text.count("while[") for text in traced] == [0, 4]
    used = np.asarray(arguments[3]) > 0
    found, expected = (np.asarray(kernel(*arguments, rule=rule)) for kernel in (there, attend))
    np.testing.assert_allclose(found[used], expected[used], atol=1e-5)


def test_the_forward_pass_computes_with_the_kernel(monkeypatch):
    """Splash, interpreted, in a whole model: rows are those of the portable kernel, within rounding."""
    interpreted = partial(attend_splash, interpret=True)
    monkeypatch.setattr(
        "extract.forward.kernel_of", lambda name, mesh, platform: interpreted if name == "splash" else attend
    )
    model, taps = load_model(TINY), [Tap("resid_post", 3)]
    token_ids = np.random.default_rng(0).integers(0, 1024, (2, 160))
    segments = np.repeat([[1, 2]], [100, 60], axis=1).repeat(2, axis=0)
    positions = np.concatenate([np.arange(100), np.arange(60)])[None].repeat(2, axis=0)
    arguments = (model.params, token_ids, segments, positions, np.arange(320))
    expected = np.asarray(make_forward(model, taps, dtype="float32")(*arguments)["resid_post"])
    other = dataclasses.replace(model, attention="splash")
    found = np.asarray(make_forward(other, taps, dtype="float32")(*arguments)["resid_post"])
    assert not np.array_equal(found, expected), "then it was the same kernel"
    assert relative_error(found, expected).max() < 2e-5


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="NOT CHECKED: cuDNN's kernel itself needs an NVIDIA GPU")
@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.softcap is None])
def test_cudnn_on_a_gpu(rule):
    arguments = inputs(200, heads=4, kv_heads=2, dtype="bfloat16")
    used = np.asarray(arguments[3]) > 0
    found, expected = (np.asarray(each(*arguments, rule=rule), np.float32)[used] for each in (attend_cudnn, attend))
    np.testing.assert_allclose(found, expected, atol=0.05)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="NOT CHECKED: rows that leave an NVIDIA GPU need one")
def test_a_run_on_a_gpu(tmp_path):
    """cuDNN is the default; rows come through pinned memory; the store holds what float32 gives, within bfloat16."""
    plan = make_plan(TINY, open_documents("python-docs", limit=20), layers=[1, 3], context=256)
    assert plan.model.attention == "cudnn"
    run(plan, str(tmp_path / "run.acts.zarr"))
    root = Root.of(tmp_path / "run.acts.zarr")
    assert verify(root, read_plan(root)).findings == ()
    store = actstore.open(str(tmp_path / "run.acts.zarr"))
    exact = load_model(TINY, dtype="float32")
    found = store.dataset().resid_post.sel(layer=3).values
    contexts = plan.contexts(0)
    forward = make_forward(exact, [Tap("resid_post", 3)], dtype="float32")
    kept = np.flatnonzero(contexts.kept)
    inputs_of = (contexts.token_ids, contexts.segment_ids, contexts.positions)
    (expected,) = np.asarray(forward(exact.params, *inputs_of, kept)["resid_post"])
    errors = relative_error(found[: len(kept)], expected)
    assert 1e-4 < errors.mean() < 0.02


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="NOT CHECKED: pinned memory is beside an NVIDIA GPU")
def test_rows_of_a_gpu_are_pinned():
    rows = toward_host(jnp.ones((4, 4)))
    assert rows.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(np.asarray(rows), np.ones((4, 4)))
