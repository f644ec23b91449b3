"""The numbers add up at every moment, and what is shown does not change afterwards."""

from __future__ import annotations

import dataclasses
import random

import pytest

from trio_socketserver import ServerStatistics
from trio_socketserver._statistics import Counters

NAMES = (
    "accepted",
    "active",
    "completed",
    "failed",
    "rejected",
    "cancelled",
    "peer_errors",
    "accept_errors",
    "abandoned_threads",
    "truncated_datagrams",
    "datagrams_dropped",
)
ENDS = ("completed", "failed", "rejected", "cancelled")


def test_shows_the_promised_numbers_and_no_others() -> None:
    assert tuple(field.name for field in dataclasses.fields(ServerStatistics)) == NAMES


def test_a_new_server_has_done_nothing() -> None:
    assert dataclasses.astuple(Counters().snapshot(0)) == (0,) * len(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "active"])
def test_each_number_is_shown_under_its_own_name(name: str) -> None:
    counters = Counters()
    if name != "datagrams_dropped":
        setattr(counters, name, 7)
    shown = dataclasses.asdict(counters.snapshot(7 if name == "datagrams_dropped" else 0))
    active = {"accepted": 7}.get(name, -7 if name in ENDS else 0)
    assert shown == {**dict.fromkeys(NAMES, 0), name: 7, "active": active}


def test_adds_up_at_every_moment() -> None:
    source = random.Random(5)
    counters = Counters()
    under_way = 0
    for _ in range(500):
        if under_way and source.random() < 0.5:
            end = source.choice(ENDS)
            setattr(counters, end, getattr(counters, end) + 1)
            under_way -= 1
        else:
            counters.accepted += 1
            under_way += 1
        shown = counters.snapshot(0)
        assert shown.active == counters.active == under_way
        assert shown.accepted == shown.active + sum(getattr(shown, end) for end in ENDS)


def test_what_was_shown_is_frozen() -> None:
    counters = Counters()
    before = counters.snapshot(0)
    counters.accepted += 1
    assert before.accepted == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.accepted = 1  # type: ignore[misc]
    assert before == Counters().snapshot(0)
    assert hash(before) == hash(Counters().snapshot(0))


def test_nothing_is_counted_under_a_mistyped_name() -> None:
    with pytest.raises(AttributeError):
        Counters().compleated = 1  # type: ignore[attr-defined]
