"""What may be varied about GPTQ."""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.search import Search, SweptSearch
from fewbits.solvers import coupled
from fewbits.solvers.factorization import DAMPING

# Of scales that are fixed beforehand, by rounding errors weighted with diag(H).
DEFAULT_SEARCH = Search(steps=31, narrowest=0.8, power=2)
# Of scales that are tried by sweeping: each candidate costs a sweep of its group.
SWEPT_SEARCH = SweptSearch(steps=4, narrowest=0.8)


@dataclass(frozen=True)
class GptqOptions:
    """What may be varied; docs/methods/gptq.md has each choice measured.

    ordered: channels by diag(H) within a group, groups by their largest. swept: factors of the range that are tried by
    sweeping a group when its turn comes; None to fix its scale beforehand, as where one spans the whole row, by
    rounding with the factors in `search`. passes: of coordinate descent. damping: share of the mean diagonal.
    coupling_damping: the same for output Grams.
    """

    ordered: bool = True
    search: Search = DEFAULT_SEARCH
    swept: SweptSearch | None = SWEPT_SEARCH
    passes: int = 2
    damping: float = DAMPING
    coupling_damping: float = coupled.DAMPING


DEFAULTS = GptqOptions()
