"""Files that are brought from other nodes while they grow: here they become what they are there, every line once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from raytune_autotuner.engine.logfile import StampedLog
from raytune_autotuner.report.logs import follow_lines
from raytune_autotuner.tune.files import Piece, Room, known_files, new_pieces, write_pieces


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def there(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def bring(there: Path, here: Path, limit: int | None = None) -> list[Piece]:
    pieces = list(new_pieces(there, known_files(here), Room(limit)))
    write_pieces(here, pieces)
    return pieces


def test_a_log_that_grows_comes_in_pieces_and_only_what_is_new(there: Path, here: Path) -> None:
    log = there / "engine.log"
    log.write_bytes(b"one\n")
    bring(there, here)
    log.write_bytes(b"one\ntwo\n")
    (piece,) = bring(there, here)
    assert (piece.name, piece.was, piece.offset) == ("engine.log", "engine.log", 4)
    assert contents(here) == {"engine.log": b"one\ntwo\n"}
    assert bring(there, here) == []


def test_a_file_that_was_replaced_comes_anew(there: Path, here: Path) -> None:
    for text in ("first", "other", "shorter"[:3], ""):
        (there / "process.json").write_text(text)
        (there / "deep").mkdir(exist_ok=True)
        (there / "deep" / "same").write_text("as it was")
        bring(there, here)
        assert contents(here) == contents(there)


def test_what_only_lies_here_stays_as_it_is(there: Path, here: Path) -> None:
    (here / "trial.json").write_text("{}")
    (there / "trial.log").write_text("{}, and more")
    bring(there, here)
    assert contents(here) == {"trial.json": b"{}", "trial.log": b"{}, and more"}


def test_an_answer_is_no_larger_than_allowed_and_the_next_ones_bring_the_rest(there: Path, here: Path) -> None:
    (there / "engine.log").write_bytes(bytes(range(256)) * 10)
    (there / "requests.parquet").write_bytes(b"x" * 2000)
    (there / "trial.log").write_bytes(b"y" * 10)
    for size in (1000, 2000, 2560):
        bring(there, here, limit=1000)
        assert len(contents(here)["engine.log"]) == size
    assert contents(here).keys() == {"engine.log", "trial.log"}  # half a table is of no use
    bring(there, here)
    assert contents(here) == contents(there)


@pytest.mark.parametrize("seed", range(5))
def test_a_log_that_turns_is_followed_line_by_line(seed: int, there: Path, here: Path) -> None:
    chance = random.Random(seed)
    log = StampedLog(there / "engine.log", limit_bytes=4000)
    rounds, written = 0, 0

    def ended() -> bool:
        nonlocal rounds, written
        lines = [f"line {written + i}" for i in range(chance.randrange(12))]
        log.write(("load", line) for line in lines)
        written, rounds = written + len(lines), rounds + 1
        bring(there, here)
        return rounds == 40

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raytune_autotuner.report.logs.POLL_S", 0.0)
        seen = [line.partition("] ")[2] for line in follow_lines(here / "engine.log", ended)]
    assert [line for line in seen if line.startswith("line")] == [f"line {i}" for i in range(written)]
    assert contents(here) == contents(there)
    log.close()


def test_a_node_cannot_write_outside_of_the_trials_folder(here: Path) -> None:
    (here.parent / "outside").write_text("as it was")
    write_pieces(
        here, [Piece("../outside", None, 0, b""), Piece("/tmp/outside", None, 0, b""), Piece("a", "../outside", 0, b"")]
    )
    assert contents(here) == {}
    assert (here.parent / "outside").read_text() == "as it was"
