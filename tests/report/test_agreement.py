import pytest

from h2s.report.agreement import agreement_text

# Fleiss' own example (1971) as it stands in the handbooks: 14 people on 10 subjects, 5 categories, kappa 0.210.
FLEISS = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]


def test_kappa_of_the_handbooks():
    votes = [[label for label, count in enumerate(counts) for _ in range(count)] for counts in FLEISS]
    assert agreement_text(votes) == (
        "10 pairs were judged by two people or more, and all say the same of 1 (0.100); "
        "Fleiss' kappa 0.21 (1 is full agreement, 0 what chance would give)"
    )


def test_two_people_by_hand():
    """0.75 agree; labels 5 and 3 of 8, so (25 + 9) / 64 = 0.53125 would by chance: 0.21875 / 0.46875."""
    assert agreement_text([[0, 0], [1, 1], [0, 1], [0, 0], [1], []]) == (
        "4 pairs were judged by two people or more, and all say the same of 3 (0.750); "
        "Fleiss' kappa 0.47 (1 is full agreement, 0 what chance would give)"
    )


@pytest.mark.parametrize(
    ("votes", "over"),
    [
        ([[0, 0], [1, 1], [0, 1], [0, 0], [1, 1, 1]], "over the 4 pairs with 2 judgements each 0.47"),
        # As many of each: those that were judged more often.
        ([[0, 1], [1, 1], [0, 0, 0], [1, 1, 1]], "over the 2 pairs with 3 judgements each 1.00"),
    ],
)
def test_kappa_says_over_which_pairs(votes, over):
    assert f"Fleiss' kappa {over} (1 is" in agreement_text(votes)


def test_kappa_where_all_judgements_are_the_same():
    assert agreement_text([[3, 3], [3, 3]]) == (
        "2 pairs were judged by two people or more, and all say the same of 2 (1.000); "
        "Fleiss' kappa is not defined where all judgements are the same"
    )


@pytest.mark.parametrize("votes", [[], [[0]], [[0], [], [1]]])
def test_nothing_is_known_of_single_judgements(votes):
    assert agreement_text(votes) == "no pair was judged by two people, so nothing is known of their agreement"
