"""The simulation of the event source mapping, in cases that have an answer in closed form."""

import math

import pytest
from world.bench import scaling
from world.bench.scaling import CONCURRENCY, DATABASE, FLIGHT, GROWTH, POLLS, Mapping, bounded, drain, provisioned

SERVICE = 0.02


def constant(batch, at_once):
    return Mapping(batch, starts=at_once, most=at_once, added=0)


@pytest.mark.parametrize(("messages", "batch", "at_once"), [(1_000_000, 10, 2), (1_000_000, 1000, 5), (10**9, 100, 10)])
def test_a_constant_number_of_invocations_drains_as_many_batches_at_once(messages, batch, at_once):
    drained = drain(messages, constant(batch, at_once), SERVICE, {})
    assert drained.seconds == pytest.approx(messages * SERVICE / (at_once * batch))
    assert set(drained.limits) == {CONCURRENCY}


def test_a_mapping_starts_with_five_invocations_and_adds_three_hundred_a_minute():
    mapping = bounded(10, 1000)
    assert [mapping.readiness(seconds) for seconds in (0, 60, 120, 3600)] == [5, 305, 605, 1000]


def test_what_drains_while_the_mapping_grows_is_the_area_under_its_growth():
    # 5 at first and 5 more each second: 5 t + 2.5 t² invocations' seconds by the time t.
    seconds = 60
    messages = round((5 * seconds + 2.5 * seconds**2) * 10 / SERVICE)
    drained = drain(messages, bounded(10, 1000), SERVICE, {})
    assert drained.seconds == pytest.approx(seconds)
    assert drained.limits == {GROWTH: pytest.approx(seconds)}


def test_once_grown_it_drains_at_its_maximum():
    grown_after = (105 - 5) / 5
    while_growing = (5 * grown_after + 2.5 * grown_after**2) * 10 / SERVICE
    drained = drain(round(while_growing) + 10**7, bounded(10, 105), SERVICE, {})
    assert drained.limits == {GROWTH: pytest.approx(grown_after), CONCURRENCY: pytest.approx(10**7 * SERVICE / (105 * 10))}


def test_a_maximum_below_five_is_what_it_starts_with():
    mapping = bounded(10, 2)
    assert [mapping.readiness(seconds) for seconds in (0, 60)] == [2, 2]


def test_the_account_bounds_what_a_mapping_or_its_pollers_would_do():
    for mapping in (bounded(10, 5000), provisioned(10, 200, 2000)):
        assert mapping.limits(math.inf, SERVICE)[CONCURRENCY] == 1000 * 10 / SERVICE


def test_the_database_is_the_limit_where_the_mapping_is_faster():
    drained = drain(10**8, constant(1000, 100), SERVICE, {DATABASE: 50_000})
    assert drained.seconds == pytest.approx(10**8 / 50_000)
    assert set(drained.limits) == {DATABASE}


def test_growth_is_the_limit_only_until_the_database_is():
    # The database is as fast as 55 invocations, which are there after ten seconds.
    drained = drain(10**8, bounded(100, 1000), SERVICE, {DATABASE: 55 * 100 / SERVICE})
    assert list(drained.limits) == [GROWTH, DATABASE]
    assert drained.limits[GROWTH] == pytest.approx(10, abs=scaling.STEP_SECONDS)


def test_no_more_messages_are_handled_at_once_than_may_be_in_flight():
    drained = drain(10**8, constant(1000, 1000), SERVICE, {})
    assert drained.seconds == pytest.approx(10**8 * SERVICE / 120_000)
    assert set(drained.limits) == {FLIGHT}


def test_a_batch_is_no_larger_than_the_event_that_lambda_delivers():
    assert bounded(10_000, 2).batch == 7400


def test_a_poller_reads_a_hundred_messages_a_second():
    mapping = provisioned(1000, 20, 20)
    drained = drain(10**6, mapping, SERVICE, {})
    assert drained.seconds == pytest.approx(10**6 / (20 * 100))
    assert set(drained.limits) == {POLLS}


def test_a_poller_collects_what_comes_in_the_window():
    assert [provisioned(1000, 2, 2, window).batch for window in (0, 1, 5, 60)] == [1, 100, 500, 1000]


def test_pollers_come_by_a_thousand_invocations_a_minute():
    mapping = provisioned(1000, 2, 200)
    assert mapping.readiness(0) == 20
    assert mapping.readiness(60) == pytest.approx(1020)
    assert mapping.readiness(3600) == 2000


def test_less_memory_stretches_the_cpu_time_and_not_the_wait():
    turn = {"ns": [30e6], "cpu_ns": 1e5}
    durations = scaling.Durations({"batches": {"situations": {"tls": {"100": {"ours": [turn]}}}}})
    # 10 ms of the 30 are CPU time.
    assert durations.ms(100, 1769) == [pytest.approx(30)]
    assert durations.ms(100, 1769 // 2) == [pytest.approx(40, rel=0.01)]
    assert durations.ms(100, 10_240) == [pytest.approx(30)]


def test_the_database_takes_measured_batches_at_the_measured_rate_and_others_in_between():
    runs = [
        {"batch": batch, "environments": environments, "messages_s": rate}
        for batch, rates in {10: {1: 5000, 8: 20_000}, 1000: {1: 90_000, 8: 100_000}}.items()
        for environments, rate in rates.items()
    ]
    database = scaling.DatabaseLimit({"environments": {"runs": runs}})
    assert database.rows_a_second(10) == pytest.approx(20_000)
    assert database.rows_a_second(1000) == pytest.approx(100_000)
    assert 20_000 < database.rows_a_second(100) < 100_000 < database.rows_a_second(7400)


def test_a_drain_with_one_at_once_foretells_that_two_take_half_as_long_until_the_emulator_is_busy():
    calibration = {"concurrency": 1, "batches": 10, "turn": 0.3, "emulator_cpu": 1.0}
    seconds = {at_once: scaling.predicted(calibration, {"concurrency": at_once, "messages": 6000}).seconds for at_once in (1, 2, 4)}
    assert seconds == {1: pytest.approx(60 * 0.3), 2: pytest.approx(60 * 0.15), 4: pytest.approx(60 * 0.1)}


def test_a_drain_with_as_many_at_once_has_their_waiting_for_each_other_in_its_turns():
    calibration = {"concurrency": 4, "batches": 10, "turn": 0.5, "emulator_cpu": 5.0}
    assert scaling.predicted(calibration, {"concurrency": 4, "messages": 6000}).seconds == pytest.approx(60 * 0.5 / 4)
