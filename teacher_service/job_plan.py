"""A job's plan as a document and as text: what it makes, takes and costs if nothing fails. ``planning.py`` makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Self

from pydantic import Field, model_validator

from softlabel_schemas.spec import Count, Sha256
from softlabel_schemas.strict import StrictModel

Amount = Annotated[float, Field(ge=0)]


class Prices(StrictModel):
    """What is paid, in any one currency.

    Attributes:
        actor_hour: for what one actor occupies, its share of a machine.
        per_1000_puts, per_1000_gets: requests to the object store.
        gib_month: for 2^30 stored bytes.
    """

    currency: str = "USD"
    actor_hour: Amount
    per_1000_puts: Amount = 0.0
    per_1000_gets: Amount = 0.0
    gib_month: Amount = 0.0


class Estimate(StrictModel):
    """``low`` to ``high`` holds 90% of the bootstrap."""

    expected: Amount
    low: Amount
    high: Amount

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        return self

    def map(self, function: Callable[[float], float]) -> Estimate:
        """``function`` must not fall."""
        return Estimate(expected=function(self.expected), low=function(self.low), high=function(self.high))


class Cost(StrictModel):
    """Attributes:
    storage_month: of one month.
    """

    currency: str
    labelling: Estimate
    requests: Amount
    storage_month: Estimate


class Plan(StrictModel):
    """What a whole job makes and takes, if nothing fails.

    Attributes:
        sampled_seconds: of speech; ``num_sampled_skipped`` of the sample's utterances could not be labelled.
        num_bytes: of all stored objects.
        num_puts: objects stored, a PUT request each.
        num_gets: GET requests: one for each utterance's audio, and for each shard its rows and its commit record.
        padding: share of the labelled seconds that is padding.
        wall_hours: from actors that have room to the last commit, without the start of machines.
        actor_hours: of all actors together, idle ones included: each is held to the end.
        memory_bytes: of an actor, with the labels of two shards.
        device_bytes: of an actor on its GPU; 0 without one.
    """

    fingerprint: Sha256
    num_shards: Count
    num_utterances: Count
    seconds: Amount
    num_actors: Count
    sampled_seconds: Amount
    num_sampled_batches: Count
    num_sampled_skipped: Count
    num_frames: Estimate
    num_bytes: Estimate
    num_puts: Count
    num_gets: Count
    padding: Amount
    wall_hours: Estimate
    actor_hours: Estimate
    memory_bytes: Count
    device_bytes: Count
    cost: Cost | None = None


def plan_lines(plan: Plan) -> Iterator[str]:
    """For people; ranges in brackets."""
    skipped = f", {plan.num_sampled_skipped} of its utterances skipped" if plan.num_sampled_skipped else ""
    yield (
        f"sample     {plan.num_sampled_batches} batches, {plan.sampled_seconds:,.0f} of {plan.seconds:,.0f} s of speech"
        f"{skipped}; "
        "[90% by bootstrap over its batches]"
    )
    yield f"shards     {plan.num_shards:,} of {plan.num_utterances:,} utterances together"
    yield f"frames     {_shown(plan.num_frames, 1, ',.0f')}"
    yield (
        f"stored     {_shown(plan.num_bytes, 2**20, ',.2f')} MiB, "
        f"{plan.num_bytes.expected / max(1.0, plan.num_frames.expected):.1f} bytes per frame"
    )
    yield f"requests   {plan.num_puts:,} PUT, {plan.num_gets:,} GET"
    yield (
        f"time       {_shown(plan.wall_hours, 1, ',.4g')} h on {plan.num_actors} actors, "
        f"{_shown(plan.actor_hours, 1, ',.4g')} actor-hours"
    )
    yield f"padding    {plan.padding:.1%} of what the teachers are given"
    device = f", {plan.device_bytes / 2**30:.1f} GiB of its GPU" if plan.device_bytes else ""
    yield f"memory     {plan.memory_bytes / 2**30:.1f} GiB for each actor{device}"
    if plan.cost is not None:
        cost, unit = plan.cost, plan.cost.currency
        yield (
            f"cost       {_shown(cost.labelling, 1, ',.4g')} {unit} labelling, {cost.requests:,.4g} {unit} requests, "
            f"{_shown(cost.storage_month, 1, ',.4g')} {unit} storage a month"
        )


def _shown(estimate: Estimate, unit: float, form: str) -> str:
    expected, low, high = (format(value / unit, form) for value in (estimate.expected, estimate.low, estimate.high))
    return f"{expected} [{low}, {high}]"
