"""Metrics of a stage: rows survive a kill, and a resumed stage does not count a step twice."""

import json
import threading

import pytest

from rlhf_ray.metrics import MetricsWriter, read_metrics


@pytest.fixture
def written(tmp_path):
    """Steps 0 to 3."""
    writer = MetricsWriter(tmp_path)
    for step in range(4):
        writer.write(step, {"loss": 1.0 / (step + 1), "note": "x"})
    writer.close()
    return tmp_path


def test_rows_come_back_in_order(written):
    rows = read_metrics(written)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[1] == {"step": 1, "loss": 0.5, "note": "x"}
    assert list((written / "tensorboard").iterdir())


def test_rows_past_the_resume_point_are_dropped(written):
    writer = MetricsWriter(written, steps_done=2)
    assert [row["step"] for row in read_metrics(written)] == [0, 1]
    writer.write(2, {"loss": 9.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(written)] == [(0, 1.0), (1, 0.5), (2, 9.0)]


def test_a_line_cut_short_by_a_kill_is_dropped(written):
    path = written / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    MetricsWriter(written, steps_done=5).close()
    assert [row["step"] for row in read_metrics(written)] == [0, 1, 2, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_kill_while_resuming_loses_no_row(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')

    def killed(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, steps_done=1)
    assert read_metrics(tmp_path) == [{"step": 0, "loss": 1.0}]


def test_a_disk_that_fails_tensorboards_thread_is_told_by_the_run_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    def fail(error):
        raise error

    MetricsWriter(tmp_path).close()
    for error in (OSError("No space left on device"), ValueError("a bug")):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
    said = capsys.readouterr().err
    assert "ValueError: a bug" in said and "No space" not in said


def test_no_metrics_are_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []
