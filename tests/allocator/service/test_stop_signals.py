"""Signals end the work where it can be given back, wait where it cannot, and are no error of what is being done."""

import signal
from collections.abc import Iterator

import pytest

from allocator.service.stop_signals import SIGNALS, Stopping, StopSignals


@pytest.fixture
def stops() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    listening = StopSignals()
    listening.listen()
    yield listening
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_makes_one_error_of_every_exception_does_not_take_it(stops: StopSignals) -> None:
    def read_model() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:
            msg = "a model must be readable"
            raise ValueError(msg) from error

    with pytest.raises(Stopping, match=r"told to stop by signal 15"):
        read_model()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_until_its_work_can_be_given_back(stops: StopSignals, number: signal.Signals) -> None:
    done: list[str] = []
    with pytest.raises(Stopping, match=rf"told to stop by signal {int(number)}"), stops.later():
        signal.raise_signal(number)
        done.append("claimed")
        try:
            with stops.at_once():
                done.append("worked")
        except Stopping:
            signal.raise_signal(number)
            done.append("given back")
            raise
    assert done == ["claimed", "given back"]


def test_where_nothing_was_begun_it_ends_the_block(stops: StopSignals) -> None:
    with pytest.raises(Stopping, match=r"told to stop"), stops.later():
        signal.raise_signal(signal.SIGINT)
    with stops.later(), stops.at_once():
        signal.raise_signal(signal.SIGINT)  # the second, which nobody hears
