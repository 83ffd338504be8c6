"""The simulation agrees with what can be computed by hand."""

import pytest

from benchmarks.throughput_model import Costs, Simulation

# One part of each is the bottleneck by far.
BOTTLENECKS = {
    "front ends": Costs(front_ends=2, front_ms=1.0, owner_ms=0.01, handover_ms=0.001),
    "owner": Costs(front_ends=16, front_ms=0.1, owner_ms=0.5, handover_ms=0.001),
    "devices": Costs(front_ends=16, front_ms=0.01, owner_ms=0.001, handover_ms=0.001, image_ms=1.0),
}


@pytest.mark.parametrize("part", BOTTLENECKS)
def test_the_slowest_part_decides(part):
    costs = BOTTLENECKS[part]
    bounds = costs.bounds()
    assert min(bounds, key=bounds.__getitem__) == part
    found = Simulation(costs, in_flight=1024, requests=5000).run()
    assert found.requests_per_s == pytest.approx(bounds[part], rel=0.1)
    assert found.busy[part] > 0.95


def test_eight_devices_serve_eight_times_as_much_until_the_owner_is_busy():
    one = Costs(front_ends=64, front_ms=0.01, owner_ms=0.001, handover_ms=0.001, image_ms=0.5)
    eight = Costs(**{**{name: getattr(one, name) for name in one.__slots__}, "gpus": 8})
    rates = [Simulation(each, 8192, requests=20_000).run().requests_per_s for each in (one, eight)]
    assert rates[1] / rates[0] == pytest.approx(8, rel=0.1)


def test_cores_bound_the_sum_of_all_parts():
    costs = Costs(cores=2, on_cpu=True, front_ends=2, client_ms=0.1, decode_ms=0.5, image_ms=0.4)
    bounds = costs.bounds()
    found = Simulation(costs, in_flight=64, requests=5000).run()
    assert min(bounds, key=bounds.__getitem__) == "cores"
    assert found.requests_per_s == pytest.approx(bounds["cores"], rel=0.1)
    assert found.busy["cores"] > 0.95


def test_more_cores_help_until_another_part_is_the_bound():
    def rate(cores: int, front_ends: int) -> float:
        costs = Costs(
            cores=cores, on_cpu=True, instances=cores, front_ends=front_ends, image_ms=0.4
        )
        return Simulation(costs, in_flight=256, requests=4000).run().requests_per_s

    assert rate(2, 1) > 1.7 * rate(1, 1)
    # One front end parses no more than 2,500 requests/s, however many cores are idle.
    assert rate(32, 1) == pytest.approx(2500, rel=0.05)
    assert rate(32, 2) > 1.7 * rate(32, 1)


def test_alone_a_request_takes_the_sum_of_its_parts():
    costs = Costs(front_ms=1, owner_ms=2, handover_ms=3, run_ms=4, image_ms=5, copy_ms=6)
    found = Simulation(costs, in_flight=1, requests=10).run()
    assert found.p50_ms == found.p99_ms == pytest.approx(21)
    assert found.batch == 1


def test_a_longer_queue_makes_larger_batches_and_not_more_runs():
    costs = Costs(front_ms=0.001, owner_ms=0.001, handover_ms=0.001, run_ms=1.0)
    batches = [Simulation(costs, in_flight, requests=4000).run().batch for in_flight in (8, 128)]
    assert batches[1] > 8 * batches[0]


def test_an_open_loop_below_every_bound_answers_at_its_rate():
    found = Simulation(Costs(), rate=2000.0, requests=8000).run()
    assert found.requests_per_s == pytest.approx(2000, rel=0.05)
    assert found.p99_ms < 10
