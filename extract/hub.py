"""Models on a HuggingFace hub: fetched into the hub's own cache, found there without a network, named by commit."""

import errno
import json
import re
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from actstore.errors import InputError, StorageError

HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)

INDEX = "model.safetensors.index.json"
WANTED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", INDEX, "*.safetensors",
)  # fmt: skip
UNWANTED = ("*/*", "consolidated*")  # other formats, and the same weights once more under names that the index lacks

SHARDS_SHOWN = 3

AGAIN = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

Progress = Callable[[str, int, int], None]

_SNAPSHOT = re.compile(r"models--(?:(?P<organisation>[^/]+?)--)?(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")


class HubError(InputError):
    """A model could not be had from the hub, nor from its cache."""


class HubUnreachableError(StorageError):
    """The hub does not answer, or broke off: the same command may succeed later, as with a storage that failed."""


def is_hub_name(name: str) -> bool:
    """Whether `name` can be a model on a hub: `organisation/model`, or `organisation/model@revision`."""
    return HUB_NAME.fullmatch(name) is not None


def hub_folder(name: str, *, progress: Progress | None = None) -> Path:
    """The folder of a model of the hub in the hub's cache, fetched if it is not there.

    Only configuration, tokenizer and safetensors are fetched; no code and no pickled weights. A name without a revision
    means the branch `main` as it is now: ask for a commit to have the same weights next year. Without a network, or
    with `HF_HUB_OFFLINE=1`, what `main` was when it was last fetched is found in the cache. `HF_HOME`, `HF_ENDPOINT`
    and `HF_TOKEN` mean what they mean to every tool of HuggingFace.

    Args:
        name: `organisation/model`, or `organisation/model@revision` with a branch, a tag or a commit.
        progress: Called as `progress(label, bytes_done, bytes_total)` while files are fetched.

    Raises:
        HubError: there is no such model or revision, it is gated, or neither hub nor cache has it, or not all of it.
        HubUnreachableError: the hub does not answer or broke off, and the cache does not have the model.
        InputError: `name` is not a name of the hub.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    found = HUB_NAME.fullmatch(name)
    if found is None:
        raise InputError(f"{name!r} is no name of a hub; expected organisation/model or organisation/model@revision")
    model, revision = found["name"], found["revision"]
    offline = constants.HF_HUB_OFFLINE
    how = "without HF_HUB_OFFLINE" if offline else "with a network"
    # Its bases are the errors of the HTTP library of the day: requests, httpx, httpx2.
    failures: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        folder = Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
                tqdm_class=_reporter(f"fetch {model}", progress),
            )
        )
    except GatedRepoError:
        raise HubError(
            f"the model {model} is gated: its owner has to let you in; accept its terms on its page of the hub, then "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"there is no folder {model}, and the hub knows no model {model} or keeps it private; check the spelling, "
            "or log in with `hf auth login` if it is yours"
        ) from None
    except RevisionNotFoundError:
        raise HubError(
            f"the model {model} has no revision {revision!r}; give a branch, a tag or a commit that it has"
        ) from None
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub does not answer ({_cause(error)})"
        place = getattr(error, "snapshot_path", None)  # newer releases know what a whole copy has
        gap = lacks(Path(place)) if place else None
        unavailable = HubError if offline or _is_final(error) else HubUnreachableError
        raise unavailable(
            f"there is no folder {name}, and no finished copy of that model in the hub's cache"
            f"{f' (it {gap})' if gap else ''}, and {why}; fetch it once {how}, or give a folder"
        ) from None
    except failures as error:
        unavailable = HubError if _is_final(error) else HubUnreachableError
        raise unavailable(
            f"the model {model} could not be fetched ({_cause(error)}); expected the hub to serve it; run the same "
            "command again, it continues"
        ) from None
    gap = lacks(folder)
    if gap and (offline or (folder / INDEX).is_file()):
        raise HubError(
            f"the copy of {model} in the hub's cache is half there: it {gap}; expected all of the model; give that "
            f"name {how}, which fetches the rest{'' if offline else ', or another revision if the hub lacks it too'}"
        )
    if gap:
        raise HubError(
            f"the model {model} has no safetensors at revision {folder.name}; expected model.safetensors or its "
            "shards: pickled weights are never read; give another revision or model"
        )
    return folder


def hub_identity(folder: Path) -> tuple[str, str] | None:
    """Name and commit of a model whose folder lies in the hub's cache, by its path; None for any other folder."""
    found = _SNAPSHOT.search(folder.resolve().as_posix())
    if found is None:
        return None
    return "/".join(filter(None, found.group("organisation", "name"))), found["commit"]


def lacks(folder: Path) -> str | None:
    """What a model's folder lacks of its weights, as the end of a sentence; None if it has some, and all of its index.

    An index that cannot be read names nothing: the loader refuses it.
    """
    try:
        named = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        named = set[str]()
    if missing := sorted(shard for shard in map(str, named) if not (folder / shard).is_file()):
        some = ", ".join(missing[:SHARDS_SHOWN]) + (", ..." if len(missing) > SHARDS_SHOWN else "")
        return f"lacks {len(missing)} of the {len(named)} shards that {INDEX} names ({some})"
    there = sorted(path.name for path in folder.glob("*"))  # it need not be there
    if any(name.endswith(".safetensors") for name in there):
        return None
    return f"has {', '.join(there) or 'nothing'}, and no safetensors"


def _reporter(label: str, progress: Progress | None) -> type[Any]:
    """A class of bars for the hub's library that draw nothing, and report the bytes of all of them together."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    bars: list[Any] = []  # those that count bytes; another counts files

    class Reporter(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": True})  # type: ignore[no-untyped-call]
            if options.get("unit") == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if progress is not None and bars:
                # Some releases count bytes twice, as received and as written: the further of the two.
                progress(label, int(max(bar.n for bar in bars)), int(max(bar.total or 0 for bar in bars)))

    return Reporter


def _cause(error: BaseException) -> str:
    """The first line of what went wrong first."""
    error = _first(error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_final(error: BaseException) -> bool:
    """Whether asking again would give the same: the disk of the cache does not take it, or the hub refuses it."""
    error = _first(error)
    status = getattr(getattr(error, "response", None), "status_code", 0)
    refused = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in AGAIN
    return refused or getattr(error, "errno", None) in FULL_OR_FORBIDDEN


def _first(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
