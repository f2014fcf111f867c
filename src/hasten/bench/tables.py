"""Tables from records: cells for the terminal, and the same as Markdown for the README.

A row is a case, a column an implementation; marks and ratios compare records of one run only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from hasten.bench.records import Record, newest

MISSING = "—"
#: kind of record -> fields in which records must agree to be compared with each other
CASES = {
    "attention": ("device", "phase", "mask", "dtype", "head_dim", "num_heads", "num_kv_heads", "batch", "seqlen"),
    "training": ("device", "model", "dtype", "batch", "seqlen"),
}
_SHORT = {"unsupported": MISSING, "out of memory": "memory", "wrong": "wrong", "failed": "failed"}


@dataclass(frozen=True)
class Cell:
    """One entry; the best of its row is marked."""

    text: str
    is_best: bool = False


@dataclass(frozen=True)
class Grid:
    """A table as text: a title that says what holds for all rows, names of columns, rows of cells."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]

    def to_markdown(self) -> str:
        """The table in Markdown, best entries bold."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "---|" + "---:|" * (len(self.columns) - 1))
        for row in self.rows:
            lines.append("| " + " | ".join(f"**{cell.text}**" if cell.is_best else cell.text for cell in row) + " |")
        return "\n".join(lines)


def grids(all_records: Sequence[Record]) -> list[Grid]:
    """Every table the records give: attention by phase, then training; of the last run of each case."""
    made = []
    attention = newest([record for record in all_records if record["kind"] == "attention"], CASES["attention"])
    for (device, dtype, phase), some in _split(attention, ("device", "dtype", "phase")):
        is_slow = max((record.get("tflops", 0.0) for record in some), default=0.0) < 1
        unit, scale = ("GFLOP/s", 1e3) if is_slow else ("TFLOP/s", 1.0)
        title = f"Attention {phase}, {unit}, {dtype}, {device} ({_versions(some)})"
        made.append(_pivot(title, some, CASES["attention"], _attention_row, partial(_throughput, scale), _ratio))
    training = newest([record for record in all_records if record["kind"] == "training"], CASES["training"])
    for (device, dtype), some in _split(training, ("device", "dtype")):
        title = f"Training step, tokens/s (MFU, peak memory), {dtype} autocast, {device} ({_versions(some)})"
        made.append(_pivot(title, some, CASES["training"], _training_row, _tokens, _speedup))
    return made


Rows = list[tuple[tuple[object, ...], list[Record]]]


def _split(some: Sequence[Record], fields: Sequence[str]) -> Rows:
    """Records by the values of some fields, in the order in which these first appear."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in some:
        groups.setdefault(tuple(record.get(field) for field in fields), []).append(record)
    return list(groups.items())


def _pivot(
    title: str,
    some: Sequence[Record],
    case: Sequence[str],
    name_row: Callable[[Record], str],
    cell: Callable[[Record], tuple[str, float]],
    compare: Callable[[list[Record]], tuple[str, str]],
) -> Grid:
    """Rows are cases, columns implementations (ours first), the last column what `compare` says of a row."""
    names = sorted(
        {record["implementation"] for record in some}, key=lambda name: (not name.startswith("hasten"), name)
    )
    rows, heading = [], ""
    for _, row in _split(some, case):
        found = {record["implementation"]: record for record in row}
        entries = [cell(found[name]) if name in found else (MISSING, 0.0) for name in names]
        best = max(value for _, value in entries)
        heading, verdict = compare(row)
        cells = [Cell(text, is_best=value == best and best > 0) for text, value in entries]
        rows.append([Cell(name_row(row[0])), *cells, Cell(verdict)])
    return Grid(title, ["", *names, heading], rows)


def _versions(some: Sequence[Record]) -> str:
    first = some[0]
    words = [f"torch {first['torch']}"]
    words += [f"{name} {first[name]}" for name in ("triton", "driver", "commit") if first.get(name)]
    return ", ".join(words)


def _attention_row(record: Record) -> str:
    heads = f"H={record['num_heads']}"
    if record["num_kv_heads"] != record["num_heads"]:
        heads += f"/{record['num_kv_heads']}"
    return f"D={record['head_dim']} {record['mask']} N={record['seqlen']} B={record['batch']} {heads}"


def _throughput(scale: float, record: Record) -> tuple[str, float]:
    if record["status"] != "ok":
        return _SHORT[record["status"]], 0.0
    rate = record["tflops"] * scale
    return f"{rate:.3g}" if rate < 100 else f"{rate:.0f}", rate


def _ratio(row: list[Record]) -> tuple[str, str]:
    """Our best against the best peer, and against the ceiling."""
    heading = "ours / best peer, of ceiling"
    ours = [record for record in row if record["implementation"].startswith("hasten") and record["status"] == "ok"]
    if not ours:
        return heading, MISSING
    fastest = min(ours, key=lambda record: float(record["median_ms"]))
    ratio = fastest["vs_best_peer"]
    return heading, f"{MISSING if ratio is None else f'{ratio:.2f}'}, {fastest['share_of_ceiling']:.0%}"


def _training_row(record: Record) -> str:
    return f"{record['model']} {record['batch']}x{record['seqlen']}"


def _tokens(record: Record) -> tuple[str, float]:
    if record["status"] != "ok":
        return _SHORT[record["status"]], 0.0
    rate = record["tokens_per_s"]
    text = f"{rate / 1e3:.1f} k" if rate >= 1e4 else f"{rate:.0f}"
    details = [f"{record['mfu']:.0%}"] if record.get("mfu") is not None else []
    details += [f"{record['peak_gb']:.1f} GB"] if record.get("peak_gb") is not None else []
    return text + (f" ({', '.join(details)})" if details else ""), rate


def _speedup(row: list[Record]) -> tuple[str, str]:
    """Our step against the fastest other, compiled with compiled where both are there, else neither compiled."""
    heading = "hasten / best other"
    rates = {record["implementation"]: record["tokens_per_s"] for record in row if record["status"] == "ok"}
    for suffix in ("+compile", ""):
        ours = rates.get(f"hasten{suffix}")
        others = [rates[name] for name in (f"eager{suffix}", f"sdpa{suffix}") if name in rates]
        if ours and others:
            return heading, f"{ours / max(others):.2f}"
    return heading, MISSING
