"""Records: one JSON line for each measurement, with all that is needed to repeat and to judge it.

Files are append-only; every table and plot is made from them. Knows no suite.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import shlex
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hasten.bench import machine
from hasten.errors import ArgumentError
from hasten.ops.cost import Rates

Record = dict[str, Any]

_PEER_PACKAGES = ("flash-attn", "flash-attn-4", "nvidia-cutlass-dsl", "transformers")


def environment(device: torch.device, commit: str | None = None) -> Record:
    """Where and with what a run was made. `commit`: for a copy of the sources that git does not know."""
    now = datetime.datetime.now(datetime.UTC)
    place: Record = {
        "run": f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}",
        "time": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "device": machine.device_name(device),
        "driver": machine.driver_version() if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.package_version("triton"),
        "peers": {name: found for name in _PEER_PACKAGES if (found := machine.package_version(name))},
        "commit": commit or machine.git_commit(),
        "command": command(),
    }
    if device.type == "cuda":
        place["cudnn"] = str(torch.backends.cudnn.version())
    else:
        place["threads"] = torch.get_num_threads()
    return place


def command() -> str:
    """What the user typed, as far as a process can know."""
    return shlex.join(["hasten", *sys.argv[1:]])


def ceiling_fields(rates: Rates) -> Record:
    """What a record says of the machine at its best."""
    return {
        "matmul_tflops": float(f"{rates.flops_per_s / 1e12:.4g}"),
        "copy_gbps": float(f"{rates.bytes_per_s / 1e9:.4g}"),
    }


def append(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file, one line each; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_line(record) + "\n" for record in records)


def to_line(record: Record) -> str:
    """A record as one line of JSON; numbers that are not finite become null."""
    return json.dumps(_finite(record), allow_nan=False)


def read(path: Path) -> list[Record]:
    """All records of a file, oldest first. Raises ArgumentError if it is not one."""
    if not path.is_file():
        raise ArgumentError("file", "a file of records", f"no file {path}", "make one with hasten bench ... --out")
    records = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or "kind" not in record:
            hint = "records are one JSON object a line with a field 'kind'"
            raise ArgumentError("file", "records", f"line {number} of {path}", hint)
        records.append(record)
    return records


def newest(records: Iterable[Record], key: Iterable[str]) -> list[Record]:
    """Of records alike in `key`, those of the last run alone: ratios hold within one run."""
    fields = tuple(key)
    runs: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        group = runs.setdefault(tuple(record.get(field) for field in fields), [])
        if group and group[0]["run"] != record["run"]:
            group.clear()
        group.append(record)
    return [record for group in runs.values() for record in group]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
