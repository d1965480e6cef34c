from __future__ import annotations

from collections import Counter

import pytest

from cni_hostport.dynamic_ports.order import first_ports


@pytest.mark.parametrize("size", [*range(1, 20), 64, 97, 100, 1000, 1009, 4096])
@pytest.mark.parametrize("length", [1, 2, 3, 16])
def test_each_place_comes_once(size: int, length: int) -> None:
    expected = range(40000, 40000 + size - length + 1)
    for seed in ("shop/web", "shop/db", ""):
        assert sorted(first_ports([(40000, 40000 + size - 1)], length, seed, "80/tcp")) == [*expected]


def test_blocks_do_not_go_from_one_range_into_the_next() -> None:
    ranges = [(40000, 40003), (41000, 41000), (42000, 42002), (65534, 65535)]
    assert sorted(first_ports(ranges, 1, "a")) == [
        40000,
        40001,
        40002,
        40003,
        41000,
        *range(42000, 42003),
        65534,
        65535,
    ]
    assert sorted(first_ports(ranges, 2, "a")) == [40000, 40001, 40002, 42000, 42001, 65534]
    assert sorted(first_ports(ranges, 4, "a")) == [40000]
    assert [*first_ports(ranges, 5, "a")] == [*first_ports([], 1, "a")] == []


def test_a_seed_always_gives_the_same_order() -> None:
    orders = [[*first_ports([(40000, 40999)], 1, *seed)] for seed in (("a", "b"), ("a", "b"), ("ab", ""), ("b", "a"))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_seeds_spread_evenly_and_go_on_differently() -> None:
    orders = [first_ports([(40000, 40063)], 1, f"shop/web-{number}", "80/tcp") for number in range(6400)]
    places = [(next(order), next(order)) for order in orders]
    for turn in (0, 1):
        times = Counter(place[turn] for place in places)
        assert len(times) == 64
        assert max(times.values()) < 160  # of 100 on average; the standard deviation is 10
    assert len(set(places)) > 1500  # of 2048: those who want the same port at first go different ways
