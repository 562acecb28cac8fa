"""Which shard comes next, when a failing one is given up, and when the job is."""

from __future__ import annotations

import pytest

from softlabel_schemas.plan import ShardRange
from teacher_service.shard_queue import MAX_ATTEMPTS, MAX_LOSSES, GaveUpError, ShardQueue

MAX_IN_A_ROW = 12


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def make(num_shards: int) -> tuple[ShardQueue, list[ShardRange], Clock]:
    shards = [ShardRange(index=3 * index, first_row=index, num_rows=1) for index in range(num_shards)]
    clock = Clock()
    return ShardQueue(shards, seed=1, clock=clock), shards, clock


def take(queue: ShardQueue, clock: Clock) -> ShardRange:
    """The next shard, whenever its pause is over; pauses are at most a minute."""
    for _ in range(600):
        shard = queue.next()
        if shard is not None:
            return shard
        clock.seconds += 0.1
    raise AssertionError("no shard within a minute")


def test_in_order() -> None:
    queue, shards, _ = make(3)
    assert [queue.next(), queue.next(), queue.next(), queue.next()] == [*shards, None]
    assert queue.num_waiting == 0


def test_a_failed_shard_pauses_while_the_others_go_on() -> None:
    queue, shards, clock = make(3)
    first = take(queue, clock)
    queue.failed(first, "OSError: slow down")
    assert [queue.next(), queue.next()] == shards[1:]
    # Its pause is random, within two seconds.
    clock.seconds += 2.0
    assert queue.next() == first
    assert queue.num_retries == 1


def test_pauses_differ_and_grow() -> None:
    pauses = []
    for seed in range(200):
        shards = [ShardRange(index=0, first_row=0, num_rows=1)]
        clock = Clock()
        queue = ShardQueue(shards, seed=seed, clock=clock)
        lengths = []
        for _ in range(2):
            shard = take(queue, clock)
            failed_at = clock.seconds
            queue.failed(shard, "reason")
            take(queue, clock)
            lengths.append(clock.seconds - failed_at)
            queue.put_back(shard)
        pauses.append(lengths)
    firsts, seconds = zip(*pauses, strict=True)
    assert max(firsts) <= 2.1
    assert max(seconds) <= 4.1
    assert sum(seconds) > 1.5 * sum(firsts)
    assert len({round(pause, 1) for pause in firsts}) > 10


def test_a_shard_that_keeps_failing_is_reported_with_its_last_error_and_the_others_are_done() -> None:
    queue, shards, clock = make(3)
    attempts = 0
    while queue.num_waiting:
        shard = take(queue, clock)
        if shard is shards[1]:
            attempts += 1
            queue.failed(shard, f"OSError: attempt {attempts}")
        else:
            queue.done()
    assert attempts == MAX_ATTEMPTS
    assert queue.num_done == 2
    with pytest.raises(
        GaveUpError, match=rf"1 shards were given up[^\n]*\n  shard 3: OSError: attempt {MAX_ATTEMPTS}$"
    ):
        queue.check()


def test_lost_actors_are_forgiven_longer_than_errors() -> None:
    queue, _, clock = make(1)
    for loss in range(MAX_LOSSES):
        assert not queue.given_up
        queue.lost(take(queue, clock), f"the node went away, time {loss + 1}")
    assert queue.given_up == {0: f"the node went away, time {MAX_LOSSES}"}


def test_a_shard_that_only_waited_is_not_blamed() -> None:
    queue, shards, clock = make(1)
    for _ in range(100):
        queue.put_back(take(queue, clock))
    assert queue.next() == shards[0]
    assert not queue.given_up
    assert queue.num_retries == 0


def test_where_nothing_succeeds_the_job_stops() -> None:
    """A full destination: no use to label 25,000 shards three times."""
    queue, _, clock = make(25_000)
    for _ in range(MAX_IN_A_ROW - 1):
        queue.failed(take(queue, clock), "No space left on device")
    last = take(queue, clock)
    message = f"the last {MAX_IN_A_ROW} attempts at shards all failed, the last one: No space left on device"
    with pytest.raises(GaveUpError, match=message):
        queue.failed(last, "No space left on device")


def test_a_success_in_between_keeps_the_job_going() -> None:
    queue, _, clock = make(1000)
    for _ in range(MAX_IN_A_ROW):
        queue.failed(take(queue, clock), "503")
        take(queue, clock)
        queue.done()
    queue.failed(take(queue, clock), "503")


def test_a_shard_that_failed_on_a_machine_is_for_another() -> None:
    queue, shards, clock = make(1)
    queue.machines = {"a", "b"}
    for machine, other in (("a", "b"), ("b", "a")):
        assert queue.next(machine) == shards[0]
        queue.failed(shards[0], "no such file", machine)
        clock.seconds += 60
        if machine == "a":
            assert queue.next(machine) is None
            assert queue.num_waiting == 1
        else:
            # It has failed on all there are.
            assert queue.next(other) == shards[0]
    queue.put_back(shards[0])
    queue.machines = {"a", "b", "c"}
    assert [queue.next(machine) for machine in ("a", "b", "c")] == [None, None, shards[0]]


def test_a_machine_that_shards_fail_on_is_given_the_others() -> None:
    queue, shards, clock = make(3)
    queue.machines = {"a", "b"}
    for shard in shards[:2]:
        assert queue.next("a") == shard
        queue.lost(shard, "killed", "a")
    clock.seconds += 60
    assert [queue.next("a"), queue.next("a")] == [shards[2], None]
    assert {queue.next("b"), queue.next("b")} == set(shards[:2])


def test_one_machine_of_several_does_not_stop_the_job() -> None:
    queue, _, clock = make(25_000)
    queue.machines = {"a", "b", "c"}
    for machine, times in (("a", 100), ("b", 4), ("c", MAX_IN_A_ROW // 3 - 1)):
        for _ in range(times):
            queue.failed(take(queue, clock), "no such file", machine)
    last = take(queue, clock)
    with pytest.raises(GaveUpError, match="the last 108 attempts at shards all failed"):
        queue.failed(last, "no such file", "c")


def test_machines_that_fail_one_shard_after_the_other_say_nothing_of_them() -> None:
    queue, shards, clock = make(4)
    queue.machines = {"a", "b", "c", "good"}
    for shard, machine in zip(shards[1:], ("a", "b", "c"), strict=True):
        assert take(queue, clock) != shard
        queue.failed(shard, "no such file", machine)
    for machine in ("a", "b", "c"):
        queue.failed(shards[0], "no such file", machine)
    assert queue.given_up == {}
    # A machine that makes others counts again.
    queue.done("a")
    for machine in ("a", "good", "good"):
        queue.done(machine)
        queue.failed(shards[0], "no such file", machine)
    assert list(queue.given_up) == [shards[0].index]


def test_a_machine_that_is_lost_for_a_moment_leaves_the_job_to_no_other() -> None:
    queue, _, clock = make(100)
    queue.machines = {"good", "bad"}
    for _ in range(40):
        queue.failed(take(queue, clock), "no such file", "bad")
    queue.lost(take(queue, clock), "killed", "good")
    queue.machines = {"bad"}
    queue.failed(take(queue, clock), "no such file", "bad")


@pytest.mark.parametrize("names", [("left",), ("left", "there")])
def test_a_machine_that_does_not_come_back_does_not_keep_the_job_going(names: tuple[str, ...]) -> None:
    queue, _, clock = make(1000)
    queue.machines = {"gone", *names}
    queue.lost(take(queue, clock), "reclaimed", "gone")
    queue.machines = set(names)
    for _ in range(4 * MAX_IN_A_ROW - 1):
        for name in names:
            queue.failed(take(queue, clock), "full", name)
    for name in names[:-1]:
        queue.failed(take(queue, clock), "full", name)
    last = take(queue, clock)
    with pytest.raises(GaveUpError, match="all failed, the last one: full"):
        queue.failed(last, "full", names[-1])


def test_where_every_actor_dies_the_job_stops() -> None:
    """A model that crashes its process: no use to load it for each of 25,000 shards."""
    queue, _, clock = make(25_000)
    for _ in range(MAX_IN_A_ROW - 1):
        queue.lost(take(queue, clock), "segmentation fault")
    last = take(queue, clock)
    with pytest.raises(GaveUpError, match="all failed, the last one: segmentation fault"):
        queue.lost(last, "segmentation fault")


def test_an_outage_that_fails_all_of_many_actors_at_once_does_not_stop_the_job() -> None:
    clock = Clock()
    shards = [ShardRange(index=index, first_row=index, num_rows=1) for index in range(1000)]
    queue = ShardQueue(shards, num_actors=64, seed=1, clock=clock)
    for _ in range(2 * 64):
        queue.failed(take(queue, clock), "gave up after 120 s")
    queue.done()
