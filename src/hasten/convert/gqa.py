"""Multi-head attention into grouped- or multi-query attention, and back: models in, models out.

`to_gqa` and `to_mha` are the public functions; `convert` also says what happened to every tensor. Where heads lie is
known by `heads`, how they become one by `merge`, which class the result has by `targets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.convert import heads as heads_module
from hasten.convert import merge, targets
from hasten.convert.calibrate import second_moments
from hasten.convert.heads import Heads, Site
from hasten.convert.report import KEPT, MADE, Report
from hasten.convert.targets import Target
from hasten.errors import ArgumentError, ArgumentTypeError


def to_gqa(
    model: Any,
    num_kv_heads: int | Sequence[int],
    *,
    method: str = "mean",
    groups: str = "contiguous",
    calibration: Iterable[Tensor] | None = None,
    seed: int = 0,
) -> Any:
    """A new model with fewer key/value heads; the given one stays as it is, and no tensor is shared.

    num_kv_heads: G, or one for every layer; 1 is multi-query attention. In a model with encoder and decoder it is
    the decoder's self- and cross-attention. G must divide the key/value heads that the model has.
    method: how a group becomes one head. `mean`, `first`, `random` as in Ainslie 2023; `aligned`: the heads of a
    group are turned towards each other, which alone changes nothing, then averaged; `factored`: the shared head and
    what each query head makes of it by least squares.
    groups: `contiguous`; `clustered`: groups of one size of the most similar heads, query heads trade places along;
    `uneven`: groups of any size, for results with a carried class.
    calibration: token ids, int64 (batch, seqlen) each; aligned, factored and groups then weigh directions as they
    occur in them. seed: of `random`.

    The result's class is transformers' own where one can hold it (`hasten.convert.targets`), else a carried one,
    which `hasten.convert.carried` holds and a saved checkpoint brings along.

    Raises ArgumentError for an unknown architecture, method or grouping, and for a G that cannot be.
    """
    return convert(model, num_kv_heads, method=method, groups=groups, calibration=calibration, seed=seed)[0]


def convert(
    model: Any,
    num_kv_heads: int | Sequence[int],
    *,
    method: str = "mean",
    groups: str = "contiguous",
    calibration: Iterable[Tensor] | None = None,
    seed: int = 0,
) -> tuple[Any, Report]:
    """As `to_gqa`: (new model, report of every tensor)."""
    wanted = expect_possible(model, num_kv_heads, method=method, groups=groups)
    sites, state = _sites(model), model.state_dict()
    moments = {} if calibration is None else second_moments(model, sites, calibration)
    old, new = {}, {}
    for order, site in enumerate(sites):
        old[site.path] = heads_module.read(site, state)
        new[site.path] = merge.merge(
            site,
            old[site.path],
            wanted[site.path],
            method=method,
            groups=groups,
            inputs=moments.get(site.path),
            seed=seed * len(sites) + order,
        )
    target = _target(model, sites, new)
    converted, report = _assemble(model, sites, new, state, target, f"{method} of {groups} groups")
    report.remarks += _remarks(sites, old, new, target, method, groups, bool(moments))
    return converted, report


def expect_possible(
    model: Any, num_kv_heads: int | Sequence[int], *, method: str = "mean", groups: str = "contiguous"
) -> dict[str, int]:
    """Key/value heads by the path of each layer; raises what `to_gqa` would raise. The model may be on meta."""
    _expect("method", method, merge.METHODS)
    _expect("groups", groups, merge.GROUPS)
    sites = _sites(model)
    _expect_room(model, groups)
    return _wanted(sites, num_kv_heads)


def to_mha(model: Any, *, is_strided: bool = False) -> Any:
    """A new model with a key/value head for every query head, which computes the same; the given one stays.

    Works for any model of a known architecture that has fewer. is_strided: query head i is given head i % G
    instead of the one it reads; this computes something else, and self-checks show that they would see it.
    """
    sites, state = _sites(model), model.state_dict()
    new = {}
    for site in sites:
        index = kv_index(model, site)
        if is_strided:
            index = [i % site.num_kv_heads for i in range(site.num_heads)]
        new[site.path] = merge.expand(heads_module.read(site, state), index)
    return _assemble(model, sites, new, state, _target(model, sites, new), "a head for each query head")[0]


def kv_index(model: Any, site: Site) -> list[int]:
    """Which key/value head each query head of a layer reads."""
    stored = (getattr(model.config, "kv_index", None) or {}).get(site.path)
    return stored or [i // site.group_size for i in range(site.num_heads)]


def _sites(model: Any) -> list[Site]:
    if not hasattr(model, "config") or not isinstance(model, torch.nn.Module):
        hint = "load it with from_pretrained"
        raise ArgumentTypeError("model", "a transformers PreTrainedModel", type(model).__name__, hint)
    return heads_module.sites(model)


def _expect(argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(argument, f"one of {', '.join(known)}", repr(value), "mean is the paper's")


def _expect_room(model: Any, groups: str) -> None:
    """Raise ArgumentError for groups that no class of the result could hold, or that cannot be grouped again."""
    if groups == "uneven" and targets.has_equal_groups_only(model.config):
        hint = "its attention needs groups of one size; clustered trades places to get them"
        raise ArgumentError("groups", f"contiguous or clustered for {model.config.model_type}", "'uneven'", hint)
    if getattr(model.config, "kv_index", None):
        hint = "convert the original model, or this one after hasten.convert.to_mha"
        raise ArgumentError("model", "contiguous groups to group further", "uneven or scattered ones", hint)


def _wanted(sites: list[Site], num_kv_heads: int | Sequence[int]) -> dict[str, int]:
    """Key/value heads by path; raises ArgumentError for numbers that cannot be."""
    num_layers = len({site.layer for site in sites})
    each = [num_kv_heads] * num_layers if isinstance(num_kv_heads, int) else list(num_kv_heads)
    if len(each) != num_layers:
        hint = "one number, or one for every layer"
        raise ArgumentError("num_kv_heads", f"{num_layers} numbers", f"{len(each)}", hint)
    for site in sites:
        has, count = site.num_kv_heads, each[site.layer]
        possible = [g for g in range(1, has + 1) if has % g == 0]
        if count not in possible:
            got = f"{count} in layer {site.layer}, which has {has} key/value heads"
            already = " (it is already grouped)" if has < site.num_heads else ""
            hint = f"possible are {', '.join(map(str, possible))}{already}"
            raise ArgumentError("num_kv_heads", f"a divisor of {has}", got, hint)
    if all(each[site.layer] == site.num_kv_heads for site in sites):
        hint = "this model is already converted" if sites[0].group_size > 1 else "that changes nothing"
        raise ArgumentError("num_kv_heads", f"fewer than {sites[0].num_kv_heads}", str(num_kv_heads), hint)
    return {site.path: each[site.layer] for site in sites}


def _target(model: Any, sites: list[Site], new: Mapping[str, Heads]) -> Target:
    counts = {site.path: new[site.path].k.shape[0] for site in sites}
    index = {path: list(heads.kv_index) for path, heads in new.items() if heads.kv_index is not None}
    return targets.choose(model, sites, counts, index)


def _assemble(
    model: Any, sites: list[Site], new: Mapping[str, Heads], state: Mapping[str, Tensor], target: Target, how: str
) -> tuple[Any, Report]:
    """The model of the target's class, and where each of its tensors comes from."""
    report = Report(source=type(model).__name__, target=target.name)
    made: dict[str, Tensor] = {}
    for site in sites:
        made |= heads_module.write(site, new[site.path], state, target.layout)
    whole = {**targets.carry_over(state, sites[0].layout, target.layout), **made}
    for name, tensor in whole.items():
        if name in made and (tensor.shape != state[name].shape or not torch.equal(tensor, state[name])):
            report.add(name, MADE, name, tensor, how)
        else:
            report.add(name, KEPT, name, tensor, "" if tensor.shape == state[name].shape else "transposed")
    return targets.build(target, whole, model), report


def _remarks(
    sites: list[Site],
    old: Mapping[str, Heads],
    new: Mapping[str, Heads],
    target: Target,
    method: str,
    groups: str,
    is_calibrated: bool,
) -> list[str]:
    """What a user should know: how much smaller the new heads are, what the weighing was, what a class cannot do."""
    remarks = []
    for part in ("k", "v"):
        ratio = [float(_size(getattr(new[site.path], part)) / _size(getattr(old[site.path], part))) for site in sites]
        remarks.append(
            f"size of {part} heads against before: {min(ratio):.2f} to {max(ratio):.2f} "
            f"(1 keeps the scale of {'scores' if part == 'k' else 'outputs'})"
        )
    if not is_calibrated and (method in ("aligned", "factored") or groups != "contiguous"):
        remarks.append("without calibration text: all directions of the input weighed the same")
    if target.carried_as:
        remarks.append(
            f"{target.carried_as}.from_pretrained(..., trust_remote_code=True) loads it; hasten needs no such"
        )
    if getattr(target.config, "new_decoder_architecture", False):
        remarks.append("transformers' Falcon caches a head for every query head all the same; its cache stays as large")
    return remarks


def _size(heads: Tensor) -> Tensor:
    return heads.square().mean().sqrt().clamp(min=1e-12)
