"""report.html: one self-contained page about a run, written at its end however it ends."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from mcore_core.context import RunContext
from mcore_core.report import completions, jsonl
from mcore_core.report.format import count, duration, short_count, size
from mcore_core.report.heatmap import heat_maps
from mcore_core.report.options import option_groups
from mcore_core.report.plots import Picture, draw
from mcore_core.report.record import RunRecord
from mcore_core.report.series import panels
from mcore_core.report.summary import outcome, start_lines

FILE_NAME = "report.html"


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """One line of the table of checkpoints."""

    name: str
    step: str
    seconds: str
    size: str
    """Empty where the folder has been removed since."""


def write_report(run: RunContext, record: RunRecord) -> Path:
    """Write report.html beside metrics.jsonl, whole or not at all; raises OSError."""
    path = run.output_dir / FILE_NAME
    partial = path.with_name(f".{FILE_NAME}.partial")
    partial.write_text(render(run, record), encoding="utf-8")
    partial.replace(path)
    return path


def render(run: RunContext, record: RunRecord) -> str:
    """Return the page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_resource("report.html.j2"))
    groups = option_groups(run.config)
    metrics, tables = (run.output_dir / name for name in (jsonl.FILE_NAME, jsonl.TABLES))
    records = list(jsonl.read(metrics)) if metrics.exists() else []
    return template.render(
        title=_title(run, record),
        style=_resource("report.css"),
        script=_resource("report.js"),
        state="failed" if record.failure else "done" if _complete(run, record) else "stopped",
        headline=outcome(run, record),
        when=datetime.fromtimestamp(record.started).astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        failure=record.failure,
        tiles=_tiles(run, record, records),
        pictures=_pictures(records),
        heat_maps=heat_maps(jsonl.read(tables) if tables.exists() else ()),
        samples=completions.samples(run.output_dir / completions.FILE_NAME),
        summary=start_lines(run, record.model, begun_at=record.first_step),
        given=[o for lines in groups.values() for o in lines if o.given],
        groups=groups,
        environment=_environment(run),
        plugins=run.plugins,
        hashes=_hashes(run.data),
        checkpoints=_checkpoints(run, record),
        warnings=record.warnings,
    )


def _resource(name: str) -> str:
    folder = files("mcore_core.report") / "templates"
    return (folder / name).read_text(encoding="utf-8")


def _complete(run: RunContext, record: RunRecord) -> bool:
    return record.step >= run.train_iters


def _title(run: RunContext, record: RunRecord) -> str:
    if not record.model:
        return run.output_dir.name
    return Path(record.model.name).name or record.model.name


def _tiles(
    run: RunContext, record: RunRecord, records: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    tiles = [("steps", f"{count(record.step)} / {count(run.train_iters)}")]
    if run.steps_per_epoch:
        tiles.append(("epochs", f"{record.step / run.steps_per_epoch:.3g}"))
    tiles.append(("time since resuming" if record.first_step else "time", duration(record.seconds)))
    tokens = sum(r.get("tokens", 0) for r in records)
    tiles.append(("tokens", short_count(tokens)))
    tiles.append(("ranks", str(run.world_size)))
    if record.model and record.model.parameters:
        tiles.append(("parameters", short_count(record.model.parameters)))
    return tiles


def _pictures(records: Sequence[Mapping[str, Any]]) -> list[Picture]:
    if not records:
        return []
    steps = (records[0]["step"], max(r["step"] for r in records))
    drawn = (draw(panel, steps) for panel in panels(records))
    return [picture for picture in drawn if picture]


def _environment(run: RunContext) -> dict[str, str]:
    layout = f"{run.world_size} rank{'s' if run.world_size > 1 else ''}"
    if run.world_size > 1:
        layout += f": {run.layout}"
    return {"layout": layout, **run.environment}


def _hashes(data: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the plain entries of the data: content hashes and the like."""
    return [(k, str(v)) for k, v in data.items() if isinstance(v, str)]


def _checkpoints(run: RunContext, record: RunRecord) -> list[CheckpointRow]:
    """List what was saved by this process, then what earlier ones left, by step."""
    known = {c.path: c for c in record.checkpoints}
    found = {p for p in run.output_dir.glob("checkpoint-*") if p.is_dir()} | set(known)
    rows = []
    for path in found:
        tail = path.name.removeprefix("checkpoint-")
        digits = tail.split("-")[0]
        step = known[path].step if path in known else int(digits) if digits.isdigit() else 0
        row = CheckpointRow(
            name=path.name,
            step=count(step),
            seconds=f"{known[path].seconds:.1f} s" if path in known else "",
            size=size(_bytes(path)) if path.exists() else "",
        )
        rows.append((step, path.name, row))
    return [row for _, _, row in sorted(rows, key=lambda r: r[:2])]


def _bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).lstat().st_size
            except OSError:
                continue  # removed by retention meanwhile
    return total
