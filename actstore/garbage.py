"""Leftovers of writers that died: lock files that nobody holds. Whatever else a dead writer left is written again."""

import dataclasses

from actstore.kvstore import Root


@dataclasses.dataclass(frozen=True)
class Garbage:
    """Lock files of a store: `dead` can go, `held` belong to writers that are alive."""

    dead: tuple[str, ...]
    held: tuple[str, ...]


def find_garbage(root: Root) -> Garbage:
    """Looks at every lock file below the store. Safe while others write."""
    found = root.lock_files()
    return Garbage(tuple(key for key, held in found if not held), tuple(key for key, held in found if held))


def remove_garbage(root: Root, garbage: Garbage) -> None:
    """Removes the dead lock files. A writer that comes to one of them meanwhile makes its own: nothing is lost."""
    for key in garbage.dead:
        root.remove_lock_file(key)
