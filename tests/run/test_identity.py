"""The split of a document."""

from nla_ray.run.identity import split_of


def test_a_larger_test_share_keeps_the_test_documents_of_a_smaller_one() -> None:
    names = [f"doc{number}" for number in range(4_000)]
    small, large = (
        {name for name in names if split_of(name, share) == "test"} for share in (0.1, 0.25)
    )
    assert (
        small < large
        and abs(len(small) / 4_000 - 0.1) < 0.02
        and abs(len(large) / 4_000 - 0.25) < 0.03
    )
    assert small == {name for name in names if split_of(name) == "test"}
    assert abs(sum(split_of(name, 0.25) == "validation" for name in names) / 4_000 - 0.06) < 0.02
