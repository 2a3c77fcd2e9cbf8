"""metrics.jsonl: valid JSON on every line, whole lines only, no step twice."""

import errno
import json
import math
from pathlib import Path

import pytest

from mcore_core.report import jsonl
from mcore_core.report.jsonl import MetricsFile


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": 2.5})
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n'
    file.write({"step": 2, "loss": 0.1 + 0.2})
    assert path.read_text().splitlines()[1] == '{"step": 2, "loss": 0.30000000000000004}'
    file.close()


def test_non_finite_values_are_null_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 7, "loss": math.nan, "grad_norm": math.inf, "x": -math.inf, "lr": 0.1})
    line = path.read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 7,
        "loss": None,
        "grad_norm": None,
        "x": None,
        "lr": 0.1,
        "nonfinite": {"loss": "nan", "grad_norm": "inf", "x": "-inf"},
    }
    (record,) = jsonl.read(path)
    assert math.isnan(record["loss"])
    assert (record["grad_norm"], record["x"]) == (math.inf, -math.inf)
    assert "nonfinite" not in record


def test_resume_removes_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.0}', '{"step": 2, "eval/loss": 2.5}']
    path.write_text("\n".join([*kept, '{"step": 3, "loss": 1.0}', '{"step": 4, "lo']))
    file = MetricsFile(path, resumed_step=2)
    file.write({"step": 3, "loss": 1.5})
    assert path.read_text().splitlines() == [*kept, '{"step": 3, "loss": 1.5}']
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_kept_line_without_its_newline_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}')
    MetricsFile(path, resumed_step=1).write({"step": 2, "loss": 2.0})
    assert [r["step"] for r in jsonl.read(path)] == [1, 2]


def test_a_new_run_keeps_the_older_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9}\n')
    MetricsFile(path).write({"step": 1})
    assert path.read_text() == '{"step": 1}\n'
    assert (tmp_path / "metrics.jsonl.old").read_text() == '{"step": 9}\n'


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1})

    class Full:
        """Writes half of what it is given, as a disk does that is just running full."""

        def write(self, data: bytes) -> int:
            return real.write(data[: len(data) // 2])

        def truncate(self, size: int) -> int:
            return real.truncate(size)

    real = file._file
    file._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left on device") as caught:
        file.write({"step": 2})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == '{"step": 1}\n'
    file._file = real
    file.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_read_skips_what_is_not_a_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n{"loss": 2}\n\xff\xfe\n{"step": "x"}\n{"step": 2}\n')
    assert [r["step"] for r in jsonl.read(path)] == [1, 2]
