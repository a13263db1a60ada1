"""How far several people who judged the same pairs agree."""

from collections import Counter
from collections.abc import Collection, Iterable

from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa


def agreement_text(votes: Iterable[Collection[int]]) -> str:
    """Say how far judgements of the same pairs agree: the share of pairs, and Fleiss' kappa (1971).

    Kappa takes equally many judgements of every pair: it is that of the pairs judged as often as most are, and the
    line says of how many.

    Args:
        votes: the labels that each pair got, one a person; pairs with fewer than two are left out.

    Returns:
        One sentence without its full stop.
    """
    shared = [list(labels) for labels in votes if len(labels) > 1]
    if not shared:
        return "no pair was judged by two people, so nothing is known of their agreement"
    same = sum(len(set(labels)) == 1 for labels in shared)
    share = f"{same} ({same / len(shared):.3f})"
    agree = f"{len(shared)} pairs were judged by two people or more, and all say the same of {share}"
    # Of two numbers that are equally frequent, the larger has the more judgements.
    times, pairs = max(Counter(map(len, shared)).items(), key=lambda item: (item[1], item[0]))
    rated = [labels for labels in shared if len(labels) == times]
    over = "" if pairs == len(shared) else f" over the {pairs} pairs with {times} judgements each"
    if len({label for labels in rated for label in labels}) == 1:
        return f"{agree}; Fleiss' kappa{over} is not defined where all judgements are the same"
    kappa = fleiss_kappa(aggregate_raters(rated)[0])
    return f"{agree}; Fleiss' kappa{over} {kappa:.2f} (1 is full agreement, 0 what chance would give)"
