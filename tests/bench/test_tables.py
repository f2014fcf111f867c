"""Tables and plots from records: right cells, best marked, runs apart, and nothing made up."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from hasten.bench import plots, tables
from hasten.errors import ArgumentError, MissingExtraError

PLACE = {
    "run": "1",
    "device": "Some GPU",
    "torch": "2.13",
    "triton": "3.6.0",
    "driver": None,
    "commit": "abc",
    "matmul_tflops": 700.0,
}


def attention(implementation: str, tflops: float | None, **changes: Any) -> dict[str, Any]:
    record = {
        **PLACE,
        **{"kind": "attention", "implementation": implementation, "phase": "forward", "mask": "causal"},
        **{"head_dim": 64, "num_heads": 32, "num_kv_heads": 32, "batch": 8, "seqlen": 2048, "dtype": "bf16"},
        "status": "unsupported",
    }
    if tflops:
        record |= {"status": "ok", "tflops": tflops, "median_ms": 100 / tflops, "share_of_ceiling": tflops / 700}
        record |= {"vs_best_peer": 1.25, "host_us": 12.3, "first_call_s": 1.234, "peak_bytes": 3 << 20}
    return record | changes


def training(implementation: str, tokens_per_s: float | None, **changes: Any) -> dict[str, Any]:
    record = {**PLACE, "kind": "training", "implementation": implementation, "model": "gpt2", "dtype": "bf16"}
    record |= {"batch": 8, "seqlen": 1024, "status": "out of memory"}
    if tokens_per_s:
        record |= {"status": "ok", "tokens_per_s": tokens_per_s, "mfu": 0.314, "peak_gb": 21.04}
    return record | changes


def test_a_table_has_ours_first_and_marks_the_best():
    some = [attention("sdpa_flash", 200.4), attention("hasten_portable", 500.0), attention("flex", None)]
    assert tables.grids(some)[0].to_markdown().splitlines() == [
        "**Attention forward, TFLOP/s, bf16, Some GPU (torch 2.13, triton 3.6.0, commit abc)**",
        "",
        "|  | hasten_portable | flex | sdpa_flash | ours / best peer, of ceiling |",
        "|---|---:|---:|---:|---:|",
        "| D=64 causal N=2048 B=8 H=32 | **500** | — | 200 | 1.25, 71% |",
    ]


def test_every_status_has_its_word():
    some = [attention(name, None, status=name) for name in ("wrong", "failed", "out of memory", "unsupported")]
    grid = tables.grids(some)[0]
    words = dict(zip(grid.columns, (cell.text for cell in grid.rows[0]), strict=True))
    assert words["wrong"] == "wrong"
    assert words["failed"] == "failed"
    assert words["out of memory"] == "memory"
    assert words["unsupported"] == words["ours / best peer, of ceiling"] == tables.MISSING
    assert not any(cell.is_best for cell in grid.rows[0])


def test_an_older_run_of_a_case_is_left_out_whole():
    old = [attention("sdpa_flash", 999.0), attention("hasten_portable", 1.0)]
    new = [attention("hasten_portable", 500.0, run="2")]
    grid = tables.grids(old + new)[0]
    assert [cell.text for cell in grid.rows[0]] == ["D=64 causal N=2048 B=8 H=32", "500", "1.25, 71%"]


def test_phases_and_devices_are_tables_of_their_own():
    some = [attention("a", 5.0), attention("a", 5.0, phase="backward"), attention("a", 5.0, device="Other")]
    titles = [grid.title.split(", ")[:2] for grid in tables.grids(some)]
    assert [phase for phase, what in titles if what == "TFLOP/s"] == [
        "Attention forward",
        "Attention backward",
        "Attention forward",
    ]


def test_what_a_call_costs_beside_device_time_is_a_table():
    some = [attention("hasten_portable", 5.0), attention("flex", None), attention("sdpa_flash", 4.0, host_us=None)]
    some[0]["saved_bytes"] = 1 << 20
    grid = tables.grids(some)[1]
    assert grid.title.startswith("Attention forward, us of host a call / s of first call / MiB beyond the inputs, bf16")
    assert grid.columns == ["", "hasten_portable", "flex", "sdpa_flash"]
    assert [cell.text for cell in grid.rows[0]][1:] == ["12 / 1.23 / 4", "—", "— / 1.23 / 3"]


def test_means_are_geometric_by_group_over_the_best_peer_and_each():
    def case(ours: float, theirs: dict[str, float], **changes: Any) -> list[dict[str, Any]]:
        return [attention(name, rate, **changes) for name, rate in {"hasten_hopper": ours, **theirs}.items()]

    some = case(200.0, {"cudnn": 100.0, "fa4": 50.0}, seqlen=512) + case(100.0, {"cudnn": 200.0, "fa4": 50.0})
    some += case(100.0, {"cudnn": 100.0}, head_dim=128) + case(300.0, {"fa4": 100.0}, mask="window:511,0")
    some += [attention("hasten_portable", 1.0)]  # the fastest of ours counts
    grid = tables.grids(some)[2]
    assert grid.title.startswith("Attention forward, ours / peer, geometric means, bf16, Some GPU")
    assert grid.columns == ["", "cases", "best peer", "least", "cudnn", "fa4"]
    assert [[cell.text for cell in row] for row in grid.rows] == [
        ["dense", "3", "1.00", "0.50", "1.00", "2.83"],
        ["dense D=128", "1", "1.00", "1.00", "1.00", "—"],
        ["dense D=64", "2", "1.00", "0.50", "1.00", "2.83"],
        ["dense N<=1024", "1", "2.00", "2.00", "2.00", "4.00"],
        ["window", "1", "3.00", "3.00", "—", "3.00"],
    ]


def test_grouped_heads_are_a_group():
    words = {"mask": "causal", "num_heads": 8}
    assert tables.group({**words, "num_kv_heads": 8}) == "dense"
    assert tables.group({**words, "num_kv_heads": 2}) == "gqa"
    assert tables.group({**words, "num_kv_heads": 2, "mask": "longformer:4,2"}) == "longformer"


def test_slow_machines_are_told_in_a_smaller_unit():
    grid = tables.grids([attention("a", 0.0526)])[0]
    assert "GFLOP/s" in grid.title
    assert grid.rows[0][1].text == "52.6"


def test_grouped_heads_are_in_the_name_of_the_row():
    grid = tables.grids([attention("a", 5.0, num_kv_heads=8)])[0]
    assert grid.rows[0][0].text.endswith("H=32/8")


def test_training_is_tokens_a_second_with_mfu_and_memory():
    rates = {"eager": None, "sdpa": 9000.0, "hasten": 36000.0, "hasten+compile": 8e4}
    some = [training(name, rate) for name, rate in rates.items()]
    (grid,) = tables.grids(some)
    assert grid.columns == ["", "hasten", "hasten+compile", "eager", "sdpa", "hasten / best other"]
    assert [cell.text for cell in grid.rows[0]] == [
        "gpt2 8x1024",
        "36.0 k (31%, 21.0 GB)",
        "80.0 k (31%, 21.0 GB)",
        "memory",
        "9000 (31%, 21.0 GB)",
        "4.00",  # like with like: uncompiled with uncompiled, where the others are not compiled
    ]


def test_other_kinds_of_records_make_no_table():
    assert tables.grids([{**PLACE, "kind": "ceiling", "implementation": "matmul"}]) == []


def test_a_plot_draws_what_was_measured(tmp_path):
    some = [
        attention(name, 100.0 * scale, seqlen=seqlen, head_dim=head_dim, phase=phase, mask=mask)
        for name, scale in (("hasten_portable", 3), ("sdpa_flash", 2), ("unheard_of", 1))
        for seqlen in (512, 1024)
        for head_dim in (64, 128)
        for phase in ("forward", "backward")
        for mask in ("causal", "window:256,0")
        if (mask, head_dim) != ("window:256,0", 128)
    ]
    path = tmp_path / "new" / "attention.png"
    plots.plot(some, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    _, axes = plots._panels(some)
    assert len(axes) == 6
    panel = ("forward", "causal", 64)
    own = [item for item in some if plots._panel(item) == panel and item["implementation"] == "hasten_portable"]
    plots._draw(axes[panel], panel, own)
    (line, ceiling) = axes["forward", "causal", 64].get_lines()
    assert list(line.get_xdata()) == [512, 1024]
    assert list(line.get_ydata()) == [300.0, 300.0]
    assert set(ceiling.get_ydata()) == {700.0}


def test_nothing_measured_is_nothing_to_plot(tmp_path):
    with pytest.raises(ArgumentError, match="file: expected records of attention that were measured"):
        plots.plot([attention("a", None)], tmp_path / "x.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hasten\[bench\]'"):
        plots.plot([attention("a", 5.0)], tmp_path / "x.png")
