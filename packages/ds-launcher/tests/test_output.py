from __future__ import annotations

import itertools
import os
import selectors
from contextlib import suppress

import pytest

from ds_launcher.output import MAX_LINE_BYTES, PIPE_BUF, Log, Sink, Source, Tail

TRACEBACK = b"Traceback (most recent call last):\n  File ...\nValueError: %d\n"


@pytest.fixture
def tail():
    return Tail(itertools.count(1).__next__)


@pytest.fixture
def selector():
    with selectors.DefaultSelector() as selector:
        yield selector


@pytest.fixture
def pipe():
    read, write = os.pipe()
    yield read, write
    for fd in (read, write):
        with suppress(OSError):  # a test may have closed it
            os.close(fd)


class TestTail:
    def test_lines_may_arrive_in_pieces(self, tail):
        for piece in (b"on", b"e\ntw", b"o\nthree"):
            tail.feed(piece)
        assert tail.excerpt() == (["one", "two", "three"], False)

    def test_only_the_last_lines_are_kept(self, tail):
        tail.feed(b"".join(b"%d\n" % number for number in range(1000)))
        lines, is_traceback = tail.excerpt(1000)
        assert (lines, is_traceback) == ([str(number) for number in range(800, 1000)], False)

    def test_the_last_traceback_is_cut_out(self, tail):
        tail.feed(TRACEBACK % 1 + b"between\n" + TRACEBACK % 2 + b"after\n")
        lines, is_traceback = tail.excerpt()
        assert is_traceback
        assert lines == ["Traceback (most recent call last):", "  File ...", "ValueError: 2", "after"]
        assert tail.traceback_tick == 2

    def test_a_chain_is_one_traceback(self, tail):
        chain = b"\nDuring handling of the above exception, another exception occurred:\n\n"
        tail.feed(TRACEBACK % 1 + chain + TRACEBACK % 2)
        lines, _ = tail.excerpt()
        assert (lines[2], lines[-1]) == ("ValueError: 1", "ValueError: 2")
        assert tail.traceback_tick == 1

    def test_exception_groups(self, tail):
        tail.feed(b"noise\n  + Exception Group Traceback (most recent call last):\n  | ExceptionGroup: two (2)\n")
        assert tail.excerpt()[0][0] == "  + Exception Group Traceback (most recent call last):"

    def test_a_progress_bar_is_its_last_state(self, tail):
        tail.feed(b"10%\r20%\r100%\r\n")
        assert tail.excerpt() == (["100%"], False)

    def test_bytes_that_are_no_text_are_escaped(self, tail):
        tail.feed(b"caf\xe9\n")
        assert tail.excerpt() == (["caf\\xe9"], False)


class TestSource:
    def make(self, selector, pipe, out, **options):
        return Source(pipe[0], Sink(out, selector), selector, **options)

    def test_every_line_gets_the_prefix(self, selector, pipe, tmp_path):
        out = os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
        source = self.make(selector, pipe, out, prefix=b"> ")
        for piece in (b"a\nb", b"c\n\n", b"end"):
            os.write(pipe[1], piece)
            assert source.read()
        os.close(pipe[1])
        source.drain()
        os.close(out)
        assert (tmp_path / "out").read_bytes() == b"> a\n> bc\n> \n> end\n"

    def test_a_line_without_end_does_not_pile_up(self, selector, pipe, tmp_path):
        out = os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
        source = self.make(selector, pipe, out, prefix=b"> ")
        for _ in range(2 * MAX_LINE_BYTES // 1024):
            os.write(pipe[1], b"x" * 1024)
            source.read()
        os.close(out)
        assert (tmp_path / "out").stat().st_size > MAX_LINE_BYTES

    def test_reading_ends_where_nothing_is_left(self, selector, pipe, tmp_path):
        out = os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
        source = self.make(selector, pipe, out)
        os.write(pipe[1], b"last words")
        source.drain()  # although the other end is open
        os.close(out)
        assert (tmp_path / "out").read_bytes() == b"last words"
        assert not source.is_open


class TestSink:
    def test_a_pipe_that_is_full_is_waited_for(self, selector, pipe):
        sink = Sink(pipe[1], selector)
        sink.put(b"x" * (1 << 21))
        while selector.select(0):
            sink.flush()
        assert sink.is_full
        taken = 0
        while not sink.is_empty:
            taken += len(os.read(pipe[0], 1 << 16))
            sink.flush()
        assert selector.select(0) == []
        assert taken > 1 << 20

    def test_pieces_end_at_a_line(self, selector, pipe):
        sink = Sink(pipe[1], selector)
        sink.put(b"x" * 3000 + b"\n" + b"y" * 3000 + b"\n")
        sink.flush()
        assert os.read(pipe[0], 1 << 16) == b"x" * 3000 + b"\n"
        sink.put(b"z" * PIPE_BUF)
        sink.flush()
        assert os.read(pipe[0], 1 << 16) == b"y" * 3000 + b"\n"

    def test_a_reader_that_is_gone_is_forgotten(self, selector, pipe):
        sink = Sink(pipe[1], selector)
        os.close(pipe[0])
        sink.put(b"x")
        sink.flush()
        sink.put(b"y")
        assert sink.is_empty
        assert not selector.get_map()

    def test_a_closed_descriptor_is_no_error(self, selector, pipe):
        os.close(pipe[1])
        sink = Sink(pipe[1], selector)
        sink.put(b"x")
        assert sink.is_empty


class TestLog:
    def test_it_is_appended_to(self, tmp_path):
        for word in (b"one\n", b"two\n"):
            log = Log(str(tmp_path / "log"))
            log.write(word)
            log.close()
        assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"

    def test_a_full_disk_is_said_and_ends_the_log(self):
        log = Log("/dev/full")
        log.write(b"x")
        log.write(b"y")
        assert log.problem == "/dev/full: No space left on device; the log ends there"
