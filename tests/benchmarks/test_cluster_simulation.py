"""The cluster's simulator against answers in closed form."""

from __future__ import annotations

import math
import statistics

import pytest

from benchmarks.cluster.events import Conditions, Outcome, shared, slowest, training
from benchmarks.cluster.figures import LEVELS, compute, exchange, measured, squeeze_step

CALM = Conditions(start=30.0)
SEEDS = 3000


def mean(outcomes: list[Outcome]) -> tuple[float, float]:
    """Mean time and its standard error."""
    seconds = [outcome.seconds for outcome in outcomes]
    return statistics.mean(seconds), statistics.stdev(seconds) / math.sqrt(len(seconds))


@pytest.mark.parametrize(("workers", "units"), [(1, 1), (1, 7), (4, 8), (4, 9), (10, 3), (64, 500)])
def test_workers_without_preemption(workers: int, units: int) -> None:
    outcome = shared(workers, units, 10.0, CALM)
    assert outcome.seconds == pytest.approx(30 + 10 * math.ceil(units / workers), rel=1e-12)
    # Who finds no unit leaves; so a worker holds its GPU for its start and its units.
    assert outcome.held == pytest.approx(30 * workers + 10 * units, rel=1e-12)
    assert (outcome.lost, outcome.preemptions) == (0.0, 0)


def test_one_worker_that_is_preempted_at_random() -> None:
    """A unit of t seconds, begun anew after every preemption, takes (1/λ + R)(e^λt − 1) on average."""
    rate, unit, units = 1 / 300, 100.0, 5
    conditions = Conditions(1 / rate, requeue=120.0, start=30.0)
    outcomes = [shared(1, units, unit, conditions, seed) for seed in range(SEEDS)]
    average, error = mean(outcomes)
    expected = 30 + units * (1 / rate + 150) * (math.exp(rate * unit) - 1)
    assert abs(average - expected) < 4 * error
    assert error < 0.02 * expected
    # What is lost: the time of a failure, given that it comes within the unit.
    failures = sum(outcome.preemptions for outcome in outcomes)
    lost = sum(outcome.lost for outcome in outcomes) / failures
    assert lost == pytest.approx(1 / rate - unit / math.expm1(rate * unit), rel=0.03)
    for outcome in outcomes[:50]:
        assert outcome.held == pytest.approx(30 * (1 + outcome.preemptions) + units * unit + outcome.lost)


def test_a_kill_at_a_known_moment() -> None:
    """Two workers, six units of 10 s; one is killed for good at 25 s: the other makes four, of which it began two."""
    outcome = shared(2, 6, 10.0, Conditions(), kills={0: 25.0})
    assert outcome.seconds == 40.0
    assert (outcome.lost, outcome.preemptions) == (5.0, 1)
    assert outcome.held == 25 + 40
    late = shared(2, 6, 10.0, Conditions(), arrivals=[0.0, 5.0], kills={0: 25.0})
    assert late.seconds == 45.0


def test_a_lease_holds_up_the_last_unit() -> None:
    """When nobody knows yet that a worker is dead, its unit waits."""
    outcome = shared(2, 2, 10.0, Conditions(lease=100.0), kills={0: 5.0})
    assert outcome.seconds == 5.0 + 100.0 + 10.0


def test_training_without_preemption() -> None:
    outcome = training(16, 2, 1000.0, 300.0, 5.0, CALM)
    assert outcome.seconds == 30 + 1000 + 4 * 5
    assert outcome.held == 16 * outcome.seconds


@pytest.mark.parametrize("nodes", [1, 3])
def test_training_that_is_killed_at_random(nodes: int) -> None:
    """Segments of c seconds and a checkpoint each (Daly 2006): (1/λ + R)(e^λ(c + d) − 1) for each."""
    every, checkpoint, segments = 300.0, 10.0, 6
    conditions = Conditions(2000.0, requeue=120.0, start=30.0)
    outcomes = [
        training(8, nodes, segments * every, every, checkpoint, conditions, told=False, seed=seed)
        for seed in range(SEEDS)
    ]
    average, error = mean(outcomes)
    rate = nodes / 2000.0
    expected = 30 + segments * (1 / rate + 150) * math.expm1(rate * (every + checkpoint))
    assert abs(average - expected) < 4 * error
    assert error < 0.02 * expected


def test_a_signal_before_a_preemption_saves_what_was_done() -> None:
    conditions = Conditions(2000.0, requeue=120.0, start=30.0)
    told = [training(1, 1, 10000.0, 300.0, 10.0, conditions, seed=seed) for seed in range(200)]
    killed = [training(1, 1, 10000.0, 300.0, 10.0, conditions, told=False, seed=seed) for seed in range(200)]
    assert all(outcome.lost == 0 for outcome in told)
    assert mean(told)[0] < mean(killed)[0]


def test_the_slowest_of_many() -> None:
    """Blom's approximation of the largest of n normal numbers."""
    assert slowest(1, 0.1) == slowest(64, 0.0) == 1.0
    expected = math.exp(0.1 * statistics.NormalDist().inv_cdf((64 - 0.375) / (64 + 0.25)))
    assert slowest(64, 0.1) == pytest.approx(expected, rel=0.01)


def test_a_step_is_arithmetic_or_asking() -> None:
    assumed = LEVELS["middle"]
    assert compute(0, {"bf16": 312e12}, assumed) == pytest.approx(1 / assumed.tensor)
    assert compute(1000, {"bf16": 1.0}, assumed) == pytest.approx(1000 * assumed.launch)
    assert exchange(1e9, 1, assumed) == 0
    eight, sixteen = exchange(1e9, 8, assumed), exchange(1e9, 16, assumed)
    assert eight == pytest.approx(2 * 7 / 8 * 1e9 / assumed.gpu_bandwidth + 6 * assumed.latency)
    assert sixteen - eight == pytest.approx(1e9 / assumed.node_bandwidth + 2 * assumed.latency)


def test_the_penalty_costs_what_was_measured() -> None:
    """With one precision for all, a penalised step takes as many plain ones as docs/results/squeeze.json says."""
    given, assumed = measured(), LEVELS["middle"]
    plain = squeeze_step(1, 1024, "none", given, assumed)["compute"]
    assert squeeze_step(1, 1024, "tf32", given, assumed)["compute"] / plain == pytest.approx(given.penalty)
    assert given.forward == pytest.approx(2 * 1.814e9, rel=0.01), "ResNet18 at 224 pixels: torchvision's 1.81 GMAC"
    assert given.parameters == 11_689_512
