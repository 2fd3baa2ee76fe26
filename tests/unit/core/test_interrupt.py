"""Signals that ask a process to stop."""

import signal
import subprocess
import sys

import pytest

from lowmem_ft.core.interrupt import ENDING, first_interrupt

SCRIPT = """
import signal, sys
from lowmem_ft.core.interrupt import clean_up_when_ended
number, before = int(sys.argv[1]), getattr(signal, sys.argv[2])
signal.signal(number, before)
clean_up_when_ended()
try:
    signal.raise_signal(number)
finally:
    print("cleaned up", flush=True)
"""


@pytest.mark.parametrize("number", ENDING)
def test_what_is_under_way_is_left_as_by_an_exception(number: int) -> None:
    for before, code in (("SIG_DFL", 128 + number), ("SIG_IGN", 0)):
        command = [sys.executable, "-c", SCRIPT, str(number), before]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (code, "cleaned up\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING])
def test_the_first_signal_is_noted_and_the_second_ends(number: int) -> None:
    before = signal.signal(number, signal.default_int_handler)
    try:
        with first_interrupt(ending=True) as noted:
            signal.raise_signal(number)
            assert noted == [number]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", ENDING)
def test_signals_that_nobody_asked_to_be_noted_stay_as_they_are(number: int) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with first_interrupt(ending=True):
            assert signal.getsignal(number) is signal.SIG_IGN
        signal.signal(number, signal.default_int_handler)
        with first_interrupt():
            assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
