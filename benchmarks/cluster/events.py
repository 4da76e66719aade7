"""What happens on a cluster in time: workers that share units, and a training of many ranks, both interrupted.

Preemptions come without memory (exponential), to a process that is at work; a preempted process loses what it was at,
is held back by the scheduler and starts again. Every random number is a function of the seed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Conditions:
    """What a cluster does to work. All times in seconds.

    Attributes:
        preempted_every: mean time between two preemptions of one worker, or one node of a training.
        requeue: how long the scheduler holds back what was preempted.
        start: from the start of a process to its first unit or step.
        lease: until others take over the unit of a worker that was preempted; 0 where it was told before, and said so.
        spread: standard deviation of the logarithm of a unit's time, and of a rank's step; their median stays.
    """

    preempted_every: float = math.inf
    requeue: float = 120.0
    start: float = 0.0
    lease: float = 0.0
    spread: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a stage took.

    Attributes:
        seconds: until it was complete.
        held: the time of all processes together in which they held their GPUs.
        lost: the part of it that went into work that was lost.
        preemptions: how many.
    """

    seconds: float
    held: float
    lost: float = 0.0
    preemptions: int = 0


def shared(
    workers: int,
    units: int,
    seconds: float,
    conditions: Conditions,
    seed: int = 0,
    *,
    arrivals: Sequence[float] = (),
    kills: Mapping[int, float] | None = None,
) -> Outcome:
    """Workers on units, as ``distill.sharing`` shares them: free ones first, then those of the dead; who finds neither
    leaves.

    Args:
        seconds: median time of a unit.
        arrivals: when each worker's process starts; at once when not given.
        kills: worker → when it is killed for good.
    """
    return _Crew(workers, units, seconds, conditions, seed, arrivals or [0.0] * workers, kills or {}).run()


@dataclass
class _Crew:
    workers: int
    units: int
    seconds: float
    conditions: Conditions
    seed: int
    arrivals: Sequence[float]
    kills: Mapping[int, float]
    events: list[tuple[float, int, str, int, float]] = field(default_factory=list)
    deserted: list[float] = field(default_factory=list)
    held: float = 0.0
    lost: float = 0.0
    preemptions: int = 0

    def run(self) -> Outcome:
        self.random = np.random.default_rng(self.seed)
        self.free, self.done, self.count = self.units, 0, 0
        self.started = list(self.arrivals)
        self.dies = [math.inf] * self.workers
        for worker in range(self.workers):
            self._push(self.started[worker] + self.conditions.start, "ready", worker, 0.0)
        now = 0.0
        while self.done < self.units:
            now, _, event, worker, began = heapq.heappop(self.events)
            if event == "ready":
                every = self.conditions.preempted_every
                dies = now + (self.random.exponential(every) if math.isfinite(every) else math.inf)
                self.dies[worker] = min(dies, self.kills.get(worker, math.inf))
                self._begin(now, worker)
            elif event == "done":
                self.done += 1
                self._begin(now, worker)
            else:
                self._preempt(now, worker, began)
        # Who left has no event any more, and who was preempted holds nothing until it starts again.
        for _, _, _, worker, _ in self.events:
            self.held += max(now - self.started[worker], 0.0)
        return Outcome(now, self.held, self.lost, self.preemptions)

    def _begin(self, now: float, worker: int) -> None:
        if self.free:
            self.free -= 1
        elif self.deserted and (self.deserted[0] <= now or not self.events):
            # Nobody else is left: the same command is given again when the lease is over.
            now = max(now, heapq.heappop(self.deserted))
        else:
            self.held += now - self.started[worker]
            return
        spread = self.conditions.spread
        ends = now + self.seconds * (self.random.lognormal(0.0, spread) if spread else 1.0)
        if ends <= self.dies[worker]:
            self._push(ends, "done", worker, now)
        else:
            self._push(self.dies[worker], "preempted", worker, now)

    def _preempt(self, now: float, worker: int, began: float) -> None:
        self.preemptions += 1
        self.lost += now - began
        self.held += now - self.started[worker]
        heapq.heappush(self.deserted, now + self.conditions.lease)
        if now >= self.kills.get(worker, math.inf):
            return
        self.started[worker] = now + self.conditions.requeue
        self._push(self.started[worker] + self.conditions.start, "ready", worker, now)

    def _push(self, when: float, event: str, worker: int, began: float) -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, event, worker, began))


def training(
    ranks: int,
    nodes: int,
    seconds: float,
    every: float,
    checkpoint: float,
    conditions: Conditions,
    *,
    told: bool = True,
    seed: int = 0,
) -> Outcome:
    """A training whose ranks all wait when one node is preempted, and go on from the last checkpoint.

    Args:
        seconds: time of all its steps.
        every: between two checkpoints.
        checkpoint: to write one.
        told: a signal comes before a preemption, and a checkpoint is written in answer; else what came after the last
            is lost.
    """
    random = np.random.default_rng(seed)
    now, left, held, lost, preemptions = conditions.start, seconds, conditions.start * ranks, 0.0, 0
    mean = conditions.preempted_every / nodes
    while True:
        # The end is a checkpoint too.
        whole = left + checkpoint * max(1, math.ceil(left / every - 1e-9))
        fails = random.exponential(mean) if math.isfinite(mean) else math.inf
        if fails >= whole:
            return Outcome(now + whole, held + whole * ranks, lost, preemptions)
        cycles = int(fails // (every + checkpoint))
        beyond = min(fails - cycles * (every + checkpoint), every)
        saved = cycles * every + (beyond if told else 0.0)
        answer = checkpoint if told else 0.0
        preemptions += 1
        lost += 0.0 if told else beyond * ranks
        left = max(left - saved, 0.0)
        now += fails + answer + conditions.requeue + conditions.start
        held += (fails + answer + conditions.start) * ranks


def slowest(ranks: int, spread: float, seed: int = 0) -> float:
    """Mean of the slowest of so many ranks' steps, where the median rank takes 1: each step waits for it."""
    if not spread or ranks == 1:
        return 1.0
    random = np.random.default_rng(seed)
    return float(random.lognormal(0.0, spread, (2000, ranks)).max(axis=1).mean())
