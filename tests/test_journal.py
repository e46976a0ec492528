"""The journal of a run: each epoch once, in JSON lines and in TensorBoard, wherever a run was cut off."""

import json
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from l2bn.records import METRICS, Metrics, read_metrics
from l2bn.training.journal import Journal
from test_records import row


def written(folder: Path, before: int, epochs: int) -> list[Metrics]:
    """A journal that opens with `before` epochs and gets more, up to `epochs`; all of them."""
    rows = [row(epoch) for epoch in range(1, epochs + 1)]
    journal = Journal(folder, rows[:before], 10 * before)
    for new in rows[before:]:
        journal.append(new)
    journal.close()
    return rows


def curve(events: EventAccumulator) -> list[tuple[int, float]]:
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars("test/top1")]


def drawing(rows: list[Metrics]) -> list[tuple[int, float]]:
    return [(int(row["epoch"] or 0), round(row["test/top1"] or 0, 4)) for row in rows]


def test_what_a_checkpoint_does_not_know_of_is_forgotten(tmp_path: Path) -> None:
    written(tmp_path, 0, 4)
    rows = written(tmp_path, 2, 3)
    assert read_metrics(tmp_path / METRICS) == rows


def test_half_a_line_is_made_whole(tmp_path: Path) -> None:
    """A kill while the third line was written, of which a checkpoint tells everything."""
    written(tmp_path, 0, 2)
    with (tmp_path / METRICS).open("a") as file:
        file.write(json.dumps(row(3))[:40])
    rows = written(tmp_path, 3, 4)
    assert read_metrics(tmp_path / METRICS) == rows


@pytest.mark.parametrize("seconds", [60, -60, 0], ids=["later", "with the clock gone back", "at once"])
def test_a_resumed_run_is_drawn_once(seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    written(tmp_path, 0, 3)
    monkeypatch.setattr(time, "time", lambda: now + seconds)
    rows = written(tmp_path, 2, 4)
    assert curve(EventAccumulator(str(tmp_path / "tb"))) == drawing(rows)


def test_a_tensorboard_that_is_looking_on_sees_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    events = EventAccumulator(str(tmp_path / "tb"))
    first = written(tmp_path, 0, 3)
    assert curve(events) == drawing(first)
    monkeypatch.setattr(time, "time", lambda: now + 60)
    rows = written(tmp_path, 2, 4)
    assert curve(events) == drawing(rows)
