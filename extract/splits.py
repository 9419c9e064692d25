"""Documents to splits such as train, val and test, by a hash of their ids alone."""

import dataclasses
import math
import re
from itertools import accumulate

from actstore.errors import InputError
from actstore.kept import place_in_split

COLUMN = "split"
_EXPECTED = "expected shares that are 1 together, such as train=0.9,val=0.05,test=0.05"


@dataclasses.dataclass(frozen=True)
class Splits:
    """Names of splits with their shares of the documents.

    A document falls into the same split in every dataset that holds it. The first split takes the lowest places of
    `actstore.Filter(split=(0, 0.9))`, and so on: a store needs no column to be split like this when it is read.

    Attributes:
        shares: (name, share) of each, the shares 1 together.
    """

    shares: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        """Refuses shares that do not make a whole."""
        names = [name for name, _ in self.shares]
        if len({*names}) != len(names) or not all(names):
            raise InputError(f"splits are named {', '.join(names)}; expected a name of its own for each; rename them")
        total = math.fsum(share for _, share in self.shares)
        if not all(share > 0 for _, share in self.shares) or not math.isclose(total, 1, abs_tol=1e-9):
            raise InputError(f"splits have the shares {[share for _, share in self.shares]}; {_EXPECTED}")

    @classmethod
    def parse(cls, text: str) -> "Splits":
        """Reads `train=0.9,val=0.05,test=0.05`.

        Raises:
            InputError: it is not of this kind.
        """
        parts = [re.fullmatch(r"\s*([^=,]+?)\s*=\s*([0-9]*\.?[0-9]+)\s*", part) for part in text.split(",")]
        if any(part is None for part in parts):
            raise InputError(f"splits are {text!r}; {_EXPECTED}")
        return cls(tuple((part[1], float(part[2])) for part in parts if part))

    def of(self, document: str) -> str:
        """The split of a document, by its id."""
        place = place_in_split(document)
        ends = accumulate(share for _, share in self.shares)
        return next((name for (name, _), end in zip(self.shares, ends, strict=True) if place < end), self.shares[-1][0])
