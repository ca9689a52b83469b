"""When the next step is launched, and what is counted of the device's time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.decode.launch_timer import HOST_PART, SPARE_S, LaunchTimer
from baton.models.batch import DeviceTime


def test_without_a_device_a_step_is_launched_at_once():
    """Guards the CPU's loop against waiting for a clock that nobody reads."""
    pace = LaunchTimer()
    pace.launched(1.0, 1.1, behind=False, prompts=False)
    pace.ended(None, 2.0, behind=False, prompts=False)
    assert pace.launch_at == 0.0


def test_the_next_step_is_launched_a_margin_before_the_end():
    """Guards against a launch so late that the device runs dry, or so early that nobody is waited for."""
    pace = LaunchTimer()
    pace.launched(0.0, 0.0002, behind=False, prompts=False)
    pace.ended(DeviceTime(0.006, 0.0), 1.0, behind=False, prompts=False)
    pace.launched(1.0, 1.0001, behind=False, prompts=False)
    assert pace.launch_at == pytest.approx(1.0001 + 0.006 - HOST_PART * 0.0002 - SPARE_S)
    pace.launched(1.0050, 1.0053, behind=True, prompts=False)
    pace.ended(DeviceTime(0.005, 0.0), 1.006, behind=False, prompts=False)
    assert pace.launch_at == pytest.approx(1.006 + 0.005 - HOST_PART * 0.0003 - SPARE_S)


@given(st.lists(st.tuples(st.floats(0.0, 0.1), st.floats(0.0, 0.01)), min_size=1, max_size=40))
def test_no_step_is_expected_to_be_longer_than_the_last_one(steps):
    """Guards against a long step, of prompts say, after which the device would run dry behind a short one."""
    pace, now = LaunchTimer(), 0.0
    for busy_s, host_s in steps:
        pace.launched(now, now + host_s, behind=True, prompts=False)
        now += busy_s
        pace.ended(DeviceTime(busy_s, 0.0), now, behind=True, prompts=False)
        assert pace.launch_at <= now + busy_s - HOST_PART * host_s - SPARE_S + 1e-12


def test_steps_with_prompts_do_not_delay_the_launch_behind_a_short_one():
    """Guards the step after a burst of prompts: expected to last as long as theirs, it would leave the device dry."""
    pace = LaunchTimer()
    pace.launched(0.0, 0.0002, behind=False, prompts=False)
    pace.ended(DeviceTime(0.005, 0.0), 1.0, behind=False, prompts=False)
    for number in range(2, 20):
        pace.ended(DeviceTime(0.017, 0.0), float(number), behind=True, prompts=True)
    assert pace.launch_at == pytest.approx(19.0 + 0.005 - HOST_PART * 0.0002 - SPARE_S)


def test_launches_of_prompts_do_not_lengthen_the_margin():
    """Guards against a margin of a whole step, with which nobody is waited for."""
    pace = LaunchTimer()
    pace.launched(0.0, 0.0002, behind=False, prompts=False)
    pace.launched(0.5, 0.512, behind=True, prompts=True)
    pace.ended(DeviceTime(0.005, 0.0), 1.0, behind=False, prompts=False)
    assert pace.launch_at == pytest.approx(1.0 + 0.005 - HOST_PART * 0.0002 - SPARE_S)


def test_gaps_are_those_of_steps_behind_others():
    """Guards the share of short gaps against the pauses of an idle worker."""
    pace = LaunchTimer()
    pace.launched(0.0, 0.0001, behind=False, prompts=False)
    pace.ended(DeviceTime(0.004, 30.0), 1.0, behind=False, prompts=False)
    pace.ended(DeviceTime(0.004, 20e-6), 1.0, behind=True, prompts=False)
    pace.ended(DeviceTime(0.004, 90e-6), 1.0, behind=True, prompts=False)
    assert pace.counters() == pytest.approx(
        {"device_busy_s": 0.012, "device_gaps": 2.0, "device_gaps_short": 1.0, "device_gap_s": 110e-6}
    )
