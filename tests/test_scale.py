"""docs/scale.md: what its cost model counts, against closed forms."""

import optax
import pytest

from benchmarks.performance import scale
from benchmarks.performance.cases import ADAPTED, AVERAGED_ADAMW, BASELINES, Case


@pytest.mark.optimized
def test_plain_descent_reads_two_arrays_and_writes_one() -> None:
    """x and g are read and x is written, in bfloat16. Nothing is kept or sent."""
    found = scale.cost(Case("sgd", "sgd", lambda: optax.sgd(0.1)))
    assert found.accessed == pytest.approx(3 * 2, rel=1e-3)
    assert (found.state, found.temporary) == pytest.approx((0, 0), abs=1e-3)
    assert (found.all_reduces, found.others) == (0, [])


@pytest.mark.optimized
def test_an_average_is_kept_read_and_written_and_progress_is_two_sums() -> None:
    plain = Case("adamw", "adamw", BASELINES["adamw"])
    adamw, average, adapted = map(scale.cost, (plain, AVERAGED_ADAMW, ADAPTED))
    assert (adamw.state, average.state, adapted.state) == pytest.approx(
        (8, 12, 12), rel=1e-3
    )
    # c is read and written, and x' read again.
    assert average.accessed - adamw.accessed == pytest.approx(4 + 4 + 2, rel=1e-2)
    assert average.all_reduces == 0
    assert (adapted.all_reduces, adapted.sums, adapted.others) == (1, 2, [])


def test_collectives_are_counted_with_what_they_send() -> None:
    program = """
      %a = (f32[4]{0}, f32[]) all-reduce(%x, %y), channel_id=1
      %b = bf16[2,3]{1,0} all-gather-start(%x), dimensions={0}
      %c = f32[7]{0} add(%x, %all-reduce.3)
    """
    assert scale.collectives(program) == [("all-reduce", 5), ("all-gather", 6)]


def test_the_time_is_the_bytes_of_a_device_and_a_latency_for_each_sum() -> None:
    hardware = scale.Hardware(bandwidth=1e12, latency=1e-5)
    cost = scale.Cost(12, 50, 0, 2, 2, [])
    assert cost.seconds(64e9, 64, hardware) == pytest.approx(0.05 + 2e-5)
    assert scale.model_seconds(1e9, scale.Hardware(flops=6e12, tokens=100)) == 0.1


def test_an_all_reduce_takes_some_time() -> None:
    assert 0 < scale.all_reduce_seconds(4, repeats=10) < 1
