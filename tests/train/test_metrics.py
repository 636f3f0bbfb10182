"""Records are neither lost nor repeated over a resume, and the live line suits its stream."""

from __future__ import annotations

import io

import pytest

from mindjax.train.metrics import MetricsWriter, Progress, read_metrics


def test_resume_cuts_what_will_be_repeated_and_a_torn_line(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    writer = MetricsWriter(tmp_path, step=3)
    writer.write(4, {"loss": 9.0})
    writer.close()
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[1]["loss"] == 0.5 and records[3]["loss"] == 9.0


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_line_rewritten_a_log_gets_few_lines(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("mindjax.train.metrics.time.monotonic", lambda: clock[0])
    terminal, log = Terminal(), io.StringIO()
    lines = [Progress("sft", 0, 50, terminal), Progress("sft", 0, 50, log)]
    for step in range(1, 51):
        clock[0] += 1.0
        for line in lines:
            line.update(step, {"loss": 2.5}, tokens=300)
    for line in lines:
        line.close()
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().count("\r") == 50
    written = log.getvalue().splitlines()
    assert 4 <= len(written) <= 7
    assert written[-1] == "sft 50/50  loss 2.5  300 tokens/s  0:00 left"
    assert "0:39 left" in written[1] and written[1].startswith("sft 11/50")
