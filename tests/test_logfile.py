"""Lines out of bytes, and a log of bounded size."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_autotuner.engine.logfile import MAX_LINE_BYTES, LineSplitter, StampedLog, log_parts, read_log, stamp
from raytune_autotuner.engine.reading import split_stamp
from raytune_autotuner.study.masking import learn, mask


def test_a_stamp_is_utc_with_milliseconds_and_the_stage() -> None:
    assert stamp(1_795_393_882.1239, "weights") == "2026-11-23T00:31:22.123Z [weights] "


def test_a_stamp_can_be_taken_off_again() -> None:
    assert split_stamp(stamp(1_795_393_882.0, "kv-cache") + "as it was") == "as it was"


@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1)), st.data())
def test_the_lines_do_not_depend_on_how_the_bytes_arrive(lines: list[str], data: st.DataObject) -> None:
    stream = "".join(line + data.draw(st.sampled_from(["\n", "\r\n", "\r"])) for line in lines).encode()
    splitter, found = LineSplitter(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += splitter.feed(stream[:size])
        stream = stream[size:]
    assert found + splitter.flush() == lines


@pytest.mark.parametrize("chunk", [1_000, MAX_LINE_BYTES, MAX_LINE_BYTES * 5])
def test_a_long_line_is_cut_and_says_by_how_much(chunk: int) -> None:
    stream = b"a" * (MAX_LINE_BYTES * 3) + b"\nnext\n"
    splitter, found = LineSplitter(), []
    for start in range(0, len(stream), chunk):
        found += splitter.feed(stream[start : start + chunk])
    assert found == ["a" * MAX_LINE_BYTES + f" [{MAX_LINE_BYTES * 2} bytes cut]", "next"]


def test_a_secret_on_the_cut_of_a_long_line_is_masked_before_it() -> None:
    learn(["SECRETVALUE1234567890"])
    for before in range(MAX_LINE_BYTES - 30, MAX_LINE_BYTES + 1):
        for after in (b"", b" more " * 5_000):
            (line,) = LineSplitter().feed(b"a" * before + b" SECRETVALUE1234567890" + after + b"\n")
            assert "SECRET" not in mask(line)
            assert len(line) <= MAX_LINE_BYTES + 20
    (line,) = LineSplitter().feed(
        b"SECRETVALUE1234567890 " * 500 + b"a" * 9_470 + b"SECRETVALUE1234567890" * 500 + b"\n"
    )
    assert line.startswith("*** " * 500 + "a")
    assert "SECRET" not in line


def test_what_some_reader_takes_for_a_lines_end_is_not_one() -> None:
    assert LineSplitter().feed("a\u2028b\x85c\x0bd\x1ce\n".encode()) == ["a\ufffdb\ufffdc\ufffdd\ufffde"]


def test_a_log_within_its_limit_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    log = StampedLog(path, 10_000)
    log.write([("arguments", "one"), ("weights", "two")])
    log.close()
    assert log_parts(path) == [path]
    assert [split_stamp(line) for line in read_log(path)] == ["one", "two"]


def test_a_log_keeps_head_and_tail_within_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    log = StampedLog(path, 8_000)
    for number in range(1_000):
        log.write([("weights", f"line {number}")])
    log.close()
    assert [part.name for part in log_parts(path)] == ["engine.log", "engine.tail.1.log", "engine.tail.log"]
    assert sum(part.stat().st_size for part in log_parts(path)) < 8_200
    said = [split_stamp(line) for line in read_log(path)]
    numbers = [int(line.split()[1]) for line in said if line.startswith("line")]
    assert numbers[0] == 0
    assert numbers[-1] == 999
    assert numbers == sorted(set(numbers))


def test_what_could_not_be_written_is_said_when_it_can_be_again(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    path.symlink_to("/dev/full")
    log = StampedLog(path, 10_000)
    log.write([("weights", "lost"), ("weights", "lost too")])
    log.close()
    path.unlink()
    log.write([("weights", "kept")])
    log.close()
    said = [split_stamp(line) for line in read_log(path)]
    assert said == ["[raytune_autotuner] about 2 lines could not be written here", "kept"]


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert list(read_log(tmp_path / "none.log")) == []
