"""What a store will hold: its plan, the plans of what was appended to it, and whether the newest is complete.

Protocol: create the plan; write blocks in any order, from any number of processes, each with its marker last, see
`markers`; seal, see `sealing`. Every step may be repeated, by anybody.

A finished store may be appended to: the next generation has a plan, markers, manifest and seal of its own in a folder
of its own. The root group says which generation is complete; until the next one is sealed, readers see that one.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from actstore.errors import (
    CorruptStoreError,
    InputError,
    PlanMismatchError,
    StoreNotFoundError,
    UnfinishedStoreError,
    UnknownNameError,
)
from actstore.generations import leads_to
from actstore.kvstore import Root
from actstore.markers import PLAN_KEY, SEAL_KEY, key_in, missing_blocks
from actstore.schema import Plan, RootAttributes
from actstore.untrusted import parse_json


def create_plan(root: Root, plan: Plan) -> None:
    """Stores the plan, or checks that the same plan is stored already.

    Raises:
        PlanMismatchError: another plan is there; the differing fields are named.
    """
    key = key_in(plan.generation, PLAN_KEY)
    stored = Plan.from_json(root.create(key, plan.to_json()), where=f"{root.url}/{key}")
    plan.refuse_other(stored, url=root.url)


def read_plan(root: Root, *, unfinished: bool = False) -> Plan:
    """The plan of the store at `root`: that of its newest complete generation, or of the first, finished or not.

    Args:
        root: place of the store.
        unfinished: True gives the generation that is being written, if there is one.

    Raises:
        StoreNotFoundError: there is none here.
        CorruptStoreError: it is damaged.
    """
    return find_plan(root, unfinished=unfinished).plan


class Found(NamedTuple):
    """The plan of a store, and whether it is complete; None where the root group, which says so, is damaged."""

    plan: Plan
    complete: bool | None


def find_plan(root: Root, *, unfinished: bool = False) -> Found:
    """As `read_plan`; the root group is read once for both answers.

    Raises:
        StoreNotFoundError: there is none here.
        CorruptStoreError: its plan is damaged.
    """
    plan = stored_plan(root, 1)
    if plan is None:
        raise StoreNotFoundError(
            f"no activation store at {root.url}: found no {PLAN_KEY}, expected a folder made by `actstore extract` or "
            f"`actstore.create`; check the path{root.hint(PLAN_KEY)}"
        )
    try:
        attributes, damaged = root_attributes(root), False
        newest = newest_complete(attributes)
    except CorruptStoreError:
        attributes, damaged = None, True
        sealed = itertools.count(1)
        newest = next(number for number in sealed if root.read(key_in(number, SEAL_KEY)) is None) - 1
    while plan.generation < newest:
        plan = _next_plan(root, plan, required=True)
    if unfinished and newest:
        plan = _next_plan(root, plan, required=False)
    with contextlib.suppress(CorruptStoreError):
        if not damaged:
            return Found(plan, _status(root, plan, attributes) == "complete")
    return Found(plan, None)


def lineage(root: Root, plan: Plan) -> tuple[Plan, ...]:
    """The plans of all generations up to `plan`, oldest first. One small read for each before it.

    Raises:
        CorruptStoreError: one is missing, damaged, or does not lead to the next.
    """
    plans = [plan]
    while (base := plans[0].base) is not None:
        before = stored_plan(root, base.generation)
        if before is None or not leads_to(before, plans[0]):
            raise CorruptStoreError(
                f"{root.url}/{key_in(base.generation, PLAN_KEY)} is missing or is not the plan that generation "
                f"{plans[0].generation} was appended to; restore it from a copy"
            )
        plans.insert(0, before)
    return tuple(plans)


def appended_plan(root: Root, extend: Callable[[Plan], Plan]) -> Plan:
    """The plan that `extend` makes of the newest complete generation, or the one it made before that is there.

    Raises:
        UnfinishedStoreError: the store itself is not complete.
        PlanMismatchError: something else is being appended; the differing fields are named.
        InputError: `extend` refuses what is there.
    """
    plans = lineage(root, read_plan(root, unfinished=True))
    for before, after in itertools.pairwise(plans):
        with contextlib.suppress(InputError):  # what was appended then is there now, and would be refused
            if extend(before).fingerprint == after.fingerprint:
                return after
    newest = plans[-1]
    if read_status(root, newest) == "complete":
        return extend(newest)
    if newest.base is None:
        raise UnfinishedStoreError(
            f"{root.url} is unfinished: {len(missing_blocks(root, newest))} of {len(newest.blocks)} blocks are "
            "missing; run the command that writes it again to finish it, then append"
        )
    try:
        extend(plans[-2]).refuse_other(newest, url=root.url)
    except PlanMismatchError as error:
        raise PlanMismatchError(
            f"{error}; or give up what is being appended with `actstore abandon {root.url}`"
        ) from None
    return newest


def stored_plan(root: Root, generation: int) -> Plan | None:
    """The plan of a generation, or None.

    Raises:
        CorruptStoreError: it is damaged, or of another generation.
    """
    key = key_in(generation, PLAN_KEY)
    data = root.read(key)
    if data is None:
        return None
    plan = Plan.from_json(data, where=f"{root.url}/{key}")
    if plan.generation != generation:
        raise CorruptStoreError(
            f"{root.url}/{key} is the plan of generation {plan.generation}, expected {generation}; restore it from a "
            "copy"
        )
    return plan


def _next_plan(root: Root, plan: Plan, *, required: bool) -> Plan:
    """The plan that was appended to `plan`; `plan` itself where there is none and none is required."""
    later = stored_plan(root, plan.generation + 1)
    if later is None and not required:
        return plan
    if later is None or not leads_to(plan, later):
        raise CorruptStoreError(
            f"{root.url}/{key_in(plan.generation + 1, PLAN_KEY)} is missing or was appended to another store than "
            f"{plan.fingerprint[:12]}; restore it from a copy"
        )
    return later


def read_status(root: Root, plan: Plan) -> Literal["writing", "complete"]:
    """`writing` or `complete`: whether the generation of `plan` is complete, from the root group's attributes.

    Raises:
        CorruptStoreError: the attributes are damaged or belong to another plan.
    """
    return _status(root, plan, root_attributes(root))


def _status(root: Root, plan: Plan, attributes: RootAttributes | None) -> Literal["writing", "complete"]:
    """The status of the generation of `plan` by the attributes of the root group."""
    if attributes is None:
        return "writing"  # killed between plan and group: nothing is committed yet
    if attributes.generation == plan.generation and attributes.fingerprint != plan.fingerprint:
        raise CorruptStoreError(
            f"{root.url}/zarr.json belongs to the plan {attributes.fingerprint[:12]}, "
            f"{key_in(plan.generation, PLAN_KEY)} is {plan.fingerprint[:12]}; "
            "two stores were mixed: restore the folder from a copy"
        )
    if attributes.generation < plan.generation:
        return "writing"
    return attributes.status if attributes.generation == plan.generation else "complete"


def refuse_lost_group(root: Root, plan: Plan) -> None:
    """Refuses a store that was finished and has lost its root group: it would look as if it were being written.

    Raises:
        CorruptStoreError: says so.
    """
    sealed = root.read(key_in(plan.generation, SEAL_KEY)) is not None
    if sealed and root.read("zarr.json") is None:
        raise CorruptStoreError(
            f"{root.url}/zarr.json is missing, and the store was finished: run `actstore verify`, then "
            "`actstore repair`, or restore it from a copy"
        )


def root_attributes(root: Root) -> RootAttributes | None:
    """What the root group says of the store; None where there is no root group.

    Raises:
        CorruptStoreError: it is damaged.
    """
    data = root.read("zarr.json")
    if data is None:
        return None
    where = f"{root.url}/zarr.json"
    try:
        return RootAttributes.model_validate(parse_json(data, where=where)["attributes"]["actstore"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptStoreError(
            f"{where} has no valid attribute `actstore` ({type(error).__name__}); restore it from a copy"
        ) from None


def newest_complete(attributes: RootAttributes | None) -> int:
    """How many generations are complete, by the root group alone."""
    return attributes.generation if attributes is not None and attributes.status == "complete" else 0


def stored_generations(root: Root) -> int:
    """How many generations have a plan, finished or not. One small read for each."""
    return next(number for number in itertools.count(1) if root.read(key_in(number + 1, PLAN_KEY)) is None)


def write_assets(root: Root, plan: Plan, assets: Mapping[str, bytes]) -> None:
    """Stores the small files whose digests the plan holds, unless they are stored already.

    Raises:
        InputError: a file is not the one the plan was made with, or one is missing.
    """
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in assets.items()}
    if digests != plan.assets:
        raise InputError(f"assets: found {sorted(assets)}, the plan has others ({sorted(plan.assets)}); plan again")
    root.create_all({f"assets/{name}": data for name, data in assets.items()})


def read_asset(root: Root, plan: Plan, name: str) -> bytes:
    """A small file that is kept with the store, compared with its digest in the plan.

    Raises:
        UnknownNameError: the store has no such file.
        CorruptStoreError: it is missing or damaged.
    """
    if name not in plan.assets:
        raise UnknownNameError(
            f"{root.url} holds no file {name!r}; it holds {', '.join(sorted(plan.assets)) or 'none'}"
        )
    data = root.read(f"assets/{name}")
    if data is None or hashlib.sha256(data).hexdigest() != plan.assets[name]:
        raise CorruptStoreError(
            f"assets/{name} of {root.url} is missing or not what the plan says; run `actstore verify`"
        )
    return data
