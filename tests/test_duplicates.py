"""Near-duplicates against every pair compared, and splits against their shares."""

import itertools

import numpy as np
import pytest

import actstore
from actstore.errors import InputError
from extract.duplicates import near_duplicates
from extract.splits import Splits


def runs(tokens: list[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[place : place + 5]) for place in range(max(len(tokens) - 4, 1))}


def jaccard(first: list[int], other: list[int]) -> float:
    one, two = runs(first), runs(other)
    return len(one & two) / len(one | two)


def changed(tokens: list[int], share: float, generator: np.random.Generator) -> list[int]:
    found = list(tokens)
    for place in generator.choice(len(found), max(round(share * len(found)), 1), replace=False):
        found[place] = int(generator.integers(1000, 2000))
    return found


def documents(seed: int) -> list[list[int]]:
    """Texts of their own, of 1 to 400 tokens, and near and far copies of some."""
    generator = np.random.default_rng(seed)
    made = [generator.integers(0, 1000, size).tolist() for size in generator.integers(1, 400, 60)]
    for number in range(0, 60, 3):
        made.append(changed(made[number], [0.0005, 0.01, 0.03, 0.2][number // 3 % 4], generator))
    made += [made[1], made[1], made[1][:-1], [5, 6], [5, 6], [5, 7]]
    return [made[place] for place in generator.permutation(len(made))]


@pytest.mark.parametrize("at_once", [100, 1 << 20])
@pytest.mark.parametrize("seed", range(6))
def test_groups_are_those_of_comparing_every_pair(seed, at_once):
    made = documents(seed)
    offsets = np.cumsum([0, *map(len, made)])
    token_id = np.concatenate([np.array(each, np.int32) for each in made]).astype(np.int32)
    groups = near_duplicates(offsets, token_id, threshold=0.8, at_once=at_once)
    expected: dict[int, list[int]] = {}
    taken: set[int] = set()
    for first, other in itertools.combinations(range(len(made)), 2):
        if first not in taken and other not in taken and jaccard(made[first], made[other]) >= 0.8:
            expected.setdefault(first, [first]).append(other)
            taken.add(other)
    assert {group.documents[0]: list(group.documents) for group in groups} == expected
    for group in groups:
        found = [jaccard(made[group.documents[0]], made[each]) for each in group.documents]
        assert group.similarities == pytest.approx(found)
    assert expected, "there are some to find"


def test_many_copies_cost_no_pairs():
    token_id = np.tile(np.arange(50, dtype=np.int32), 20_000)
    (group,) = near_duplicates(np.arange(0, len(token_id) + 1, 50), token_id)
    assert len(group.documents) == 20_000


@pytest.mark.parametrize("threshold", [0, -1, 1.01])
def test_a_threshold_outside_is_refused(threshold):
    with pytest.raises(
        InputError, match=f"near-duplicates are asked for from {threshold}; expected a similarity over 0"
    ):
        near_duplicates(np.array([0, 1]), np.zeros(1, np.int32), threshold=threshold)


def test_splits_have_their_shares_and_depend_on_the_id_alone():
    splits = Splits.parse("train=0.8, val=.15,test=0.05")
    found = [splits.of(f"document {number}") for number in range(20_000)]
    for name, share in splits.shares:
        assert abs(found.count(name) - 20_000 * share) < 5 * np.sqrt(20_000 * share * (1 - share))
    train = actstore.Filter(split=(0, 0.8))
    from actstore.kept import place_in_split

    for number in range(1000):
        inside = train.split[0] <= place_in_split(f"document {number}") < train.split[1]
        assert inside == (found[number] == "train"), "the same as a filter's"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train", "splits are 'train'; expected shares that are 1 together, such as train=0.9,val=0.05,test=0.05"),
        ("train=0.9,val=0.2", r"splits have the shares \[0.9, 0.2\]; expected shares that are 1 together"),
        ("train=1,val=0", r"splits have the shares \[1.0, 0.0\]; expected"),
        ("a=0.5,a=0.5", "splits are named a, a; expected a name of its own for each"),
        ("a=-0.5,b=1.5", "splits are 'a=-0.5,b=1.5'; expected"),
        ("", "splits are ''; expected"),
    ],
)
def test_shares_that_make_no_whole_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Splits.parse(text)
