"""decode.launch_timer: when the next step is launched, and the measured device time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.decode.launch_timer import HOST_PART, SPARE_S, LaunchTimer
from baton.models.batch import DeviceTime


def test_without_a_device_a_step_is_launched_at_once():
    """Guards the CPU loop against waiting for a device."""
    timer = LaunchTimer()
    timer.launched(1.0, 1.1, behind=False, prompts=False)
    timer.ended(None, 2.0, prompts=False)
    assert timer.launch_at == 0.0


def test_the_next_step_is_launched_a_margin_before_the_end():
    """Guards against a launch so late that the device idles, or so early that new requests miss the step."""
    timer = LaunchTimer()
    timer.launched(0.0, 0.0002, behind=False, prompts=False)
    timer.ended(DeviceTime(0.006, 0.0), 1.0, prompts=False)
    timer.launched(1.0, 1.0001, behind=False, prompts=False)
    assert timer.launch_at == pytest.approx(1.0001 + 0.006 - HOST_PART * 0.0002 - SPARE_S)
    timer.launched(1.0050, 1.0053, behind=True, prompts=False)
    timer.ended(DeviceTime(0.005, 0.0), 1.006, prompts=False)
    assert timer.launch_at == pytest.approx(1.006 + 0.005 - HOST_PART * 0.0003 - SPARE_S)


@given(st.lists(st.tuples(st.floats(0.0, 0.1), st.floats(0.0, 0.01)), min_size=1, max_size=40))
def test_no_step_is_expected_to_be_longer_than_the_last_one(steps):
    """Guards against an idle device behind a short step that follows a long one."""
    timer, now = LaunchTimer(), 0.0
    for busy_s, host_s in steps:
        timer.launched(now, now + host_s, behind=True, prompts=False)
        now += busy_s
        timer.ended(DeviceTime(busy_s, 0.0), now, prompts=False)
        assert timer.launch_at <= now + busy_s - HOST_PART * host_s - SPARE_S + 1e-12


def test_steps_with_prompts_do_not_delay_the_launch_behind_a_short_one():
    """Guards against an idle device after a burst of prompts, whose steps are longer than the next one."""
    timer = LaunchTimer()
    timer.launched(0.0, 0.0002, behind=False, prompts=False)
    timer.ended(DeviceTime(0.005, 0.0), 1.0, prompts=False)
    for number in range(2, 20):
        timer.ended(DeviceTime(0.017, 0.0), float(number), prompts=True)
    assert timer.launch_at == pytest.approx(19.0 + 0.005 - HOST_PART * 0.0002 - SPARE_S)


def test_launches_of_prompts_do_not_lengthen_the_margin():
    """Guards against a margin of a whole step, with which new requests miss the step."""
    timer = LaunchTimer()
    timer.launched(0.0, 0.0002, behind=False, prompts=False)
    timer.launched(0.5, 0.512, behind=True, prompts=True)
    timer.ended(DeviceTime(0.005, 0.0), 1.0, prompts=False)
    assert timer.launch_at == pytest.approx(1.0 + 0.005 - HOST_PART * 0.0002 - SPARE_S)
