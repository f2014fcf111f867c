"""Whole runs of a tiny model: it learns, resumes to the bit, says what it does, and refuses folders of others."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hasten.errors import ArgumentError, CheckpointError
from hasten.train import Evaluated, Finished, OptimizerConfig, Saved, Started, Stepped, Warned, train
from hasten.train import loop as module
from hasten.train.log import read
from tests.engine.tiny_checkpoints import llama
from tests.train import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def whole(folder):
    """(events, end) of a run that nothing interrupted."""
    told = []
    end = train(runs.config(folder, "whole", eval_data=(str(folder / "held-out.txt"),), eval_every=4), told.append)
    return told, end


def of(told, kind):
    return [event for event in told if isinstance(event, kind)]


def test_a_run_learns_and_says_so(folder, whole):
    told, end = whole
    (started,) = of(told, Started)
    assert (started.step, started.steps, started.processes, started.precision) == (0, 8, 1, "fp32")
    assert started.attention == "hasten" and started.loss.startswith("linear")
    steps = of(told, Stepped)
    assert [event.step for event in steps] == list(range(1, 9))
    assert steps[0].lr == pytest.approx(5e-3) and steps[2].lr == pytest.approx(1e-2)
    assert all(event.tokens_per_s > 0 and event.mfu is None for event in steps) and steps[-1].left_s == 0
    assert [event.step for event in of(told, Saved)] == [2, 4, 6, 8]
    assert [event.step for event in of(told, Evaluated)] == [0, 4, 8]
    assert end == told[-1] and end.is_whole and end.step == 8
    assert end.eval_last < end.eval_first - 0.5 and end.loss == steps[-1].loss


def test_the_model_loads_in_transformers(folder, whole):
    model = transformers.AutoModelForCausalLM.from_pretrained(whole[1].model)
    assert transformers.AutoTokenizer.from_pretrained(whole[1].model).eos_token == "<eos>"
    assert type(model).__module__.startswith("transformers") and model.config.use_cache
    trained = load_file(folder / "whole" / "checkpoints" / "step-000000008" / "model.safetensors")
    assert all(torch.equal(one, trained[name]) for name, one in model.named_parameters())
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "whole" / "checkpoints" / "step-000000008")
    assert all(torch.equal(one, trained[name]) for name, one in again.named_parameters())


def test_tied_weights_and_the_dtype_stay_as_they_were(folder):
    llama(folder / "tied", torch.bfloat16, tie_word_embeddings=True)
    end = train(runs.config(folder, "tied-run", model=str(folder / "tied"), steps=1))
    written, source = (load_file(f"{path}/model.safetensors") for path in (end.model, folder / "tied"))
    assert {name: one.shape for name, one in written.items()} == {name: one.shape for name, one in source.items()}
    assert {one.dtype for one in written.values()} == {torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(end.model, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight


def test_the_log_has_every_line_once(folder, whole):
    lines = read(folder / "whole")
    assert [line["step"] for line in lines if line["kind"] == "stepped"] == list(range(1, 9))
    assert lines[-1]["kind"] == "finished" and {"loss", "lr", "grad_norm", "tokens_per_s"} <= set(lines[1])


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_stopped_and_resumed_is_never_interrupted(folder, whole, stop, monkeypatch):
    """Stopped by a signal after any step, also between two checkpoints; the log is then as if nothing had been."""
    config = runs.config(folder, f"stopped-{stop}", eval_data=(str(folder / "held-out.txt"),), eval_every=4)

    def interrupt(event):
        if isinstance(event, Stepped) and event.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    end = train(config, interrupt)
    assert not end.is_whole and stop <= end.step <= stop + 1 and end.model is None
    told = []
    resumed = train(config, told.append)
    assert of(told, Started)[0].step == end.step
    assert (resumed.loss, resumed.eval_first, resumed.eval_last) == (
        whole[1].loss,
        whole[1].eval_first,
        whole[1].eval_last,
    )
    assert runs.same(runs.tensors(folder / f"stopped-{stop}"), runs.tensors(folder / "whole"))
    steps = {line["step"]: line["loss"] for line in read(folder / f"stopped-{stop}") if line["kind"] == "stepped"}
    assert steps == {event.step: event.loss for event in of(whole[0], Stepped)}


def test_a_finished_run_is_finished(folder, whole):
    told = []
    end = train(runs.config(folder, "whole", eval_data=(str(folder / "held-out.txt"),)), told.append)
    assert not of(told, Stepped) and not of(told, Saved)
    was = whole[1]
    assert (end.step, end.loss, end.eval_first, end.eval_last) == (8, was.loss, was.eval_first, was.eval_last)


@pytest.mark.parametrize(
    "changes",
    [{"micro_batch": 1}, {"recompute": True}, {"attention": "eager"}],
    ids=["accumulated", "recomputed", "eager"],
)
def test_ways_to_compute_a_step_agree(folder, changes):
    model = str(folder / "no-dropout")
    llama(folder / "no-dropout")
    plain = train(runs.config(folder, "plain", model=model))
    other = train(runs.config(folder, f"other-{next(iter(changes))}", model=model, **changes))
    assert other.loss == pytest.approx(plain.loss, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
def test_bf16_learns_the_same_and_resumes_to_the_bit(folder, whole, precision):
    one = runs.config(folder, f"{precision}-whole", precision=precision)
    end = train(one)
    assert end.loss == pytest.approx(whole[1].loss, rel=0.05)
    half = runs.config(folder, f"{precision}-half", precision=precision)
    train(replace(half, steps=3))
    train(half)
    found = runs.tensors(folder / f"{precision}-half")
    assert runs.same(found, runs.tensors(folder / f"{precision}-whole"))
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(folder, whole):
    before = sorted((folder / "whole").rglob("*"))
    config = runs.config(folder, "whole")
    other = replace(config, batch=2, schedule=replace(config.schedule, peak_lr=1e-3))
    with pytest.raises(
        CheckpointError, match=r"other settings: schedule\.peak_lr was 0.01, is 0.001; batch was 4, is 2; repeat"
    ):
        train(other)
    llama(folder / "wider", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"is the run of another model \(.*/model\); choose another --out"):
        train(replace(config, model=str(folder / "wider")))
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"is no run folder, and not empty \(thesis.tex\)"):
        train(runs.config(folder, "mine"))
    assert sorted((folder / "whole").rglob("*")) == before


def test_data_that_cannot_be_used_leaves_a_folder_that_can(folder):
    config = runs.config(folder, "bad-data")
    with pytest.raises(ArgumentError, match="which is not there"):
        train(replace(config, data=replace(config.data, paths=("nowhere.txt",))))
    assert train(replace(config, steps=1)).step == 1


def test_rows_longer_than_the_model_are_refused(folder):
    config = runs.config(folder, "long")
    with pytest.raises(ArgumentError, match="seqlen: expected at most the model's 64 positions, got 65"):
        train(replace(config, data=replace(config.data, seqlen=65)))


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(folder):
    config = runs.config(folder, "nan", optimizer=OptimizerConfig(clip_norm=0))
    config = replace(config, schedule=replace(config.schedule, peak_lr=90.0, warmup_steps=0), steps=8)
    healthy = module.Step.train

    def break_fourth(self, batches, lr):
        values = healthy(self, batches, 1e-3)
        self.calls = getattr(self, "calls", 0) + 1
        return values * float("nan") if self.calls == 4 else values

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ArgumentError) as raised:
        patch.setattr(module.Step, "train", break_fourth)
        train(config)
    assert "loss stays finite, got nan in step 4" in str(raised.value)
    assert "the checkpoint of step 2 stands" in str(raised.value)
    assert sorted(path.name for path in (folder / "nan" / "checkpoints").iterdir()) == ["step-000000002"]


def test_deterministic_operations_are_asked_for_while_it_runs(folder):
    seen = []
    config = runs.config(folder, "deterministic", steps=1, deterministic=True)
    train(config, lambda event: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert all(seen) and not torch.are_deterministic_algorithms_enabled()


def test_two_processes_do_not_train_in_one_folder(folder):
    config = runs.config(folder, "locked")

    def again(event):
        if isinstance(event, Started):
            with pytest.raises(CheckpointError, match="another process trains in it"):
                train(config)

    assert train(replace(config, steps=1), again).step == 1


def test_a_random_beginning_needs_only_a_configuration(folder):
    (folder / "fresh").mkdir()
    (folder / "fresh" / "config.json").write_text((folder / "model" / "config.json").read_text())
    config = runs.config(folder, "fresh-run", model=str(folder / "fresh"), tokenizer=str(folder / "model"), steps=2)
    end = train(config)
    assert json.loads((folder / "fresh-run" / "model" / "config.json").read_text())["dtype"] == "float32"
    assert isinstance(end, Finished) and not isinstance(end, Warned)
