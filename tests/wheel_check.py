"""Builds the wheel, installs it in an empty environment without extras, and reads a committed store there.

Run by `make wheel-check` and by CI. Reading must need no JAX, and old stores stay readable.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

TOP = Path(__file__).parent.parent
GOLDEN = TOP / "tests/golden"

READ = """
import sys
import actstore
import xarray as xr
stores = sys.argv[1:]
for url in stores:
    store = actstore.open(url)
    site = store.sites[0]
    with store.batches(site=site.name, layer=(site.layers or (None,))[0], batch_size=8, epochs=1) as batches:
        rows = sum(len(batch) for batch in batches)
    plain = xr.open_zarr(url, chunks=None)[site.name].values
    engine = xr.open_dataset(url)[site.name].values
    assert (plain.astype("float32") == engine.astype("float32")).all(), url
    print(f"{url.rsplit('/', 1)[-1]}: {store.samples} samples, {rows} in batches, {engine.shape} {plain.dtype}")
loaded = sorted({"jax", "flax", "torch", "transformers", "tokenizers", "extract"} & set(sys.modules))
assert not loaded, f"reading a store imported {loaded}"
for name in ("jax", "flax", "torch", "transformers"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is installed without having been asked for")
print("no machine-learning library is installed or imported")
"""


def main() -> None:
    """Fails with the output of the step that failed."""
    stores = sorted(str(path) for path in GOLDEN.glob("*.acts.zarr") if (path / ".act/SEALED.json").exists())
    if not stores:
        sys.exit(f"no finished golden store in {GOLDEN}; expected at least one")
    with tempfile.TemporaryDirectory(prefix="actstore-wheel-") as name:
        work = Path(name)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", work, TOP)
        (wheel,) = work.glob("*.whl")
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        venv.create(work / "venv", with_pip=True)
        python = work / "venv/bin/python"
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
        print(run(python, "-W", "error", "-c", READ, *stores, where=work))
        print(run(work / "venv/bin/actstore", "info", stores[0], where=work))
        missing = subprocess.run(
            [work / "venv/bin/actstore", "plan", "--model", "tiny-qwen2", "--documents", "python-docs"],
            capture_output=True, text=True, cwd=work,
        )  # fmt: skip
        if missing.returncode != 2 or "pip install 'actstore[extract]'" not in missing.stderr:
            sys.exit(f"`actstore plan` without the extra `extract` should say how to install it:\n{missing.stderr}")
        print(missing.stderr.strip())


def run(*command: object, where: Path = TOP) -> str:
    """Runs a command; its output ends the program when it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=where)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:200]}\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
