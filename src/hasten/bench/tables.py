"""Tables from records: cells for the terminal, and the same as Markdown for the README.

A row is a case, a column an implementation; marks and ratios compare records of one run only.
"""

from __future__ import annotations

import math
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
    """Every table the records give: attention by phase, then training; of the last run of each case.

    Attention has three for each phase: throughput, what a call costs beside device time, and means over groups.
    """
    made = []
    attention = newest([record for record in all_records if record["kind"] == "attention"], CASES["attention"])
    for (device, dtype, phase), some in _split(attention, ("device", "dtype", "phase")):
        is_slow = max((record.get("tflops", 0.0) for record in some), default=0.0) < 1
        unit, scale = ("GFLOP/s", 1e3) if is_slow else ("TFLOP/s", 1.0)
        title = f"Attention {phase}, {unit}, {dtype}, {device} ({_versions(some)})"
        made.append(_pivot(title, some, CASES["attention"], _attention_row, partial(_throughput, scale), _ratio))
        place = f"{dtype}, {device} ({_versions(some)})"
        title = f"Attention {phase}, us of host a call / s of first call / MiB beyond the inputs, {place}"
        made.append(_pivot(title, some, CASES["attention"], _attention_row, _costs))
        made += _means(f"Attention {phase}, ours / peer, geometric means, {place}", some)
    training = newest([record for record in all_records if record["kind"] == "training"], CASES["training"])
    for (device, dtype), some in _split(training, ("device", "dtype")):
        title = f"Training step, tokens/s (MFU, peak memory), {dtype} autocast, {device} ({_versions(some)})"
        made.append(_pivot(title, some, CASES["training"], _training_row, _tokens, _speedup))
    return made


Rows = list[tuple[tuple[object, ...], list[Record]]]


def markdown(corner: str, some: Sequence[Record], case: Callable[[Record], str], told: Callable[[Record], str]) -> str:
    """One Markdown table: a line for each `case`, a column for each implementation, in each cell what is `told`."""
    names = list(dict.fromkeys(record["implementation"] for record in some))
    rows: dict[str, dict[str, str]] = {}
    for record in some:
        rows.setdefault(case(record), {})[record["implementation"]] = told(record)
    lines = [f"| {corner + ' ' if corner else ''}| " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    lines += [f"| {one} | " + " | ".join(row.get(name, "—") for name in names) + " |" for one, row in rows.items()]
    return "\n".join(lines)


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
    compare: Callable[[list[Record]], tuple[str, str]] | None = None,
) -> Grid:
    """Rows are cases, columns implementations (ours first), the last column what `compare` says of a row, if any."""
    names = sorted(
        {record["implementation"] for record in some}, key=lambda name: (not name.startswith("hasten"), name)
    )
    rows: list[list[Cell]] = []
    heading: list[str] = []
    for _, row in _split(some, case):
        found = {record["implementation"]: record for record in row}
        entries = [cell(found[name]) if name in found else (MISSING, 0.0) for name in names]
        best = max(value for _, value in entries)
        cells = [Cell(text, is_best=value == best and best > 0) for text, value in entries]
        rows.append([Cell(name_row(row[0])), *cells])
        if compare is not None:
            *heading, verdict = compare(row)
            rows[-1].append(Cell(verdict))
    return Grid(title, ["", *names, *heading], rows)


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


def _costs(record: Record) -> tuple[str, float]:
    """Host microseconds, seconds of the first call, MiB beyond the inputs; of a backward with what was saved for it."""
    if record["status"] != "ok":
        return _SHORT[record["status"]], 0.0
    host_us, first_s, peak = (record.get(name) for name in ("host_us", "first_call_s", "peak_bytes"))
    numbers = (
        MISSING if host_us is None else f"{host_us:.0f}",
        MISSING if first_s is None else f"{first_s:.2f}",
        MISSING if peak is None else f"{(peak + record.get('saved_bytes', 0)) / 2**20:.0f}",
    )
    return " / ".join(numbers), 0.0


def group(record: Record) -> str:
    """The group of a case: its mask's name, dense for causal and full, gqa for grouped heads of those."""
    if record["mask"] in ("causal", "full"):
        return "dense" if record["num_heads"] == record["num_kv_heads"] else "gqa"
    return str(record["mask"]).partition(":")[0]


def _groups(record: Record) -> list[str]:
    """Every line of the means in which a case counts."""
    name = group(record)
    lines = [name, f"{name} D={record['head_dim']}"]
    return [*lines, "dense N<=1024"] if name == "dense" and record["seqlen"] <= 1024 else lines


def _means(title: str, some: Sequence[Record]) -> list[Grid]:
    """Ours over the best peer of each case, mean and least, and over each peer, by group; none without both."""
    ratios: dict[str, list[dict[str, float]]] = {}
    for _, row in _split(some, CASES["attention"]):
        times = {record["implementation"]: record["median_ms"] for record in row if record["status"] == "ok"}
        ours = [time for name, time in times.items() if name.startswith("hasten")]
        peers = {name: time / min(ours) for name, time in times.items() if ours and not name.startswith("hasten")}
        if peers:
            for line in _groups(row[0]):
                ratios.setdefault(line, []).append(peers)
    names = sorted({name for cases in ratios.values() for peers in cases for name in peers})
    rows = []
    for line in sorted(ratios):
        cases = ratios[line]
        if " D=" in line and len(cases) == len(ratios[line.partition(" ")[0]]):
            continue  # a group of one head_dim
        best = [min(peers.values()) for peers in cases]
        each = [[peers[name] for peers in cases if name in peers] for name in names]
        texts = [line, str(len(cases)), _mean(best), f"{min(best):.2f}", *map(_mean, each)]
        rows.append([Cell(text) for text in texts])
    columns = ["", "cases", "best peer", "least", *names]
    return [Grid(title, columns, rows)] if rows else []


def _mean(values: Sequence[float]) -> str:
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.2f}" if values else MISSING


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
