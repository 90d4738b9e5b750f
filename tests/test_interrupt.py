import os
import pickle
import signal
import threading

import pytest

from prunesearch.study.interrupt import SIGNALS, Interrupt, Interrupted, LeaseLost


@pytest.mark.parametrize("name", SIGNALS)
def test_the_first_signal_requests_a_stop_and_is_named(name: str) -> None:
    number = getattr(signal, name)
    stop, notes = Interrupt(), []
    before = signal.getsignal(number)
    with stop.on_signals(notes.append):
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as caught:
            stop.check()
    assert caught.value.signal == stop.signal == number
    assert len(notes) == 1
    assert signal.getsignal(number) == before


def test_ctrl_c_after_a_signal_stops_at_once() -> None:
    with Interrupt().on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_shared_flag_stops_all_and_names_no_signal() -> None:
    class Shared:
        value = 0

    flag = Shared()
    one, other = Interrupt(flag), Interrupt(flag)
    one.request()
    with pytest.raises(Interrupted) as caught:
        other.check()
    assert caught.value.signal is None
    assert not Interrupt().requested


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    handlers = []

    def look() -> None:
        with Interrupt().on_signals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_exceptions_keep_their_attributes_when_pickled() -> None:
    assert pickle.loads(pickle.dumps(Interrupted(15))).signal == 15
    lost = pickle.loads(pickle.dumps(LeaseLost("minus-3")))
    assert lost.candidate == "minus-3"
    assert "minus-3" in str(lost)
    assert LeaseLost().candidate is None
