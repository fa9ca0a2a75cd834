import math

import pytest

from regrow.training.record import RECENT_STEPS, RunRecord, what_is_wrong


def test_loss_of_an_interval_is_the_mean_of_its_steps_also_across_a_resume():
    record = RunRecord(step=3, tokens=30)
    record.add_step(1.0)
    resumed = RunRecord(**record.as_json())
    resumed.add_step(2.0)
    resumed.add_step(6.0)
    entry = resumed.close_interval(0.1, None)
    assert entry is not None
    assert entry["loss"] == 3.0
    assert resumed.losses == [entry]
    assert resumed.close_interval(0.1, None) is None


def test_best_is_the_lowest_finite_kl_and_ties_keep_the_earlier():
    record = RunRecord()
    seen = [record.add_evaluation(i, {"kl": kl}) for i, kl in enumerate([0.5, math.nan, 0.4, 0.4, 0.6])]
    assert seen == [True, False, True, False, False]
    assert (record.best_step, record.best_kl) == (2, 0.4)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_wrong_from_the_first_step(loss):
    assert "loss is" in (what_is_wrong(loss, 1.0, []) or "")


def test_a_broken_gradient_is_wrong():
    assert "gradient" in (what_is_wrong(1.0, math.inf, []) or "")


def test_a_leap_is_wrong_only_against_enough_history():
    calm = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.3, 1.0]
    assert what_is_wrong(4.1, 1.0, calm[:7]) is None
    assert "leapt from 1 to 4.1" in (what_is_wrong(4.1, 1.0, calm) or "")
    assert what_is_wrong(3.9, 1.0, calm) is None
    # Near zero everything is a multiple of everything else.
    assert what_is_wrong(9e-4, 1.0, [1e-6] * 10) is None


def test_history_is_bounded():
    record = RunRecord()
    for step in range(RECENT_STEPS + 5):
        record.add_step(float(step))
    assert len(record.recent) == RECENT_STEPS
    assert record.recent[-1] == RECENT_STEPS + 4
