"""However a job is ended, none of its processes is left, grandchildren included (promise P06)."""

from __future__ import annotations

import signal

import psutil
import pytest

FAMILY = """
    import signal, subprocess
    subprocess.Popen([sys.executable, "-c", waits])
    subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
    say("ready")
    signal.pause()
"""


@pytest.fixture
def family(jobs):
    """Two ranks, each with a child, and one in another session that ignores SIGTERM."""
    job = jobs.start(FAMILY, "--nproc", "2", "--grace", "0.3")
    job.lines(6)
    assert len(job.processes()) == 8
    return job


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_to_the_launcher(family, number):
    family.popen.send_signal(number)
    result = family.finish()
    assert result.code == 128 + number
    assert result.error.endswith(f"ds run: ended by {number.name}\n")


def test_sigkill_of_the_launcher(family):
    family.popen.kill()
    family.popen.wait()
    family.assert_gone()


def test_sigkill_of_the_agent(family):
    agent = psutil.Process(family.popen.pid).children()[0]
    agent.kill()
    result = family.finish()
    assert result.code == 128 + signal.SIGKILL
    assert "ended without a report (killed by SIGKILL); all ranks were ended" in result.error


def test_sigterm_to_the_agent_itself(family):
    psutil.Process(family.popen.pid).children()[0].terminate()
    assert family.finish().code == 128 + signal.SIGTERM


def test_sigkill_of_the_launcher_while_its_output_is_blocked(jobs):
    # Nobody reads: the pipe is full, and whoever waits for it to take more would never see the launcher go.
    job = jobs.start("while True: print('x' * 1000)", "--nproc", "2")
    job.lines(1)
    job.popen.kill()
    job.popen.wait()
    job.assert_gone()


def test_ranks_end_before_their_children_do(jobs):
    # A data worker that dies first would break the last save of its rank.
    text = """
        import signal, subprocess
        child = subprocess.Popen([sys.executable, "-c", waits])
        def stop(number, frame):
            say("child runs:", child.poll() is None)
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        say("ready")
        while True:
            signal.pause()
    """
    job = jobs.start(text, "--nproc", "1")
    job.lines(2)
    # The same signal twice at once, as `timeout` sends it, is one request, not an order to kill.
    job.popen.terminate()
    job.popen.terminate()
    result = job.finish()
    assert (result.code, result.text) == (128 + signal.SIGTERM, "child runs: True\n")


def test_sigint_is_a_keyboard_interrupt(jobs):
    text = """
        import signal
        try:
            say("ready")
            signal.pause()
        except KeyboardInterrupt:
            say("saved")
    """
    job = jobs.start(text, "--nproc", "1")
    job.lines(1)
    job.popen.send_signal(signal.SIGINT)
    result = job.finish()
    assert (result.code, result.text) == (128 + signal.SIGINT, "saved\n")


def test_sigint_becomes_sigterm_for_a_rank_that_does_not_hear_it(jobs):
    text = """
        import signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: (say("term"), os._exit(0)))
        say("ready")
        while True:
            signal.pause()
    """
    job = jobs.start(text, "--nproc", "1", "--grace", "1")
    job.lines(1)
    job.popen.send_signal(signal.SIGINT)
    result = job.finish()
    assert (result.code, result.text) == (128 + signal.SIGINT, "term\n")


def test_nohup_is_respected(jobs):
    text = "import signal\nsay('ready')\nsys.stdin.read()\nsay('end')"
    job = jobs.start(
        text,
        "--nproc",
        "1",
        stdin=-1,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    job.lines(1)
    job.popen.send_signal(signal.SIGHUP)
    result = job.finish()  # closes its input, which lets it end
    assert (result.code, result.text) == (0, "end\n")
