"""The training stage as a whole: it learns, says so, ends when told, and refuses what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
import trainbed
from structlog.testing import capture_logs

from job.errors import ExitCode, JobError
from job.stop import Stop, preempted
from job.train.checkpoints import fingerprints
from job.train.meters import read_history
from job.train.stage import train

EXPERTS = ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]
SLOWLY = {"max_steps": 4, "checkpoint_every_steps": 1}


class Bed:
    """A model and its rows on disk, and training on them."""

    def __init__(self, folder, arch="llama", *, packed=True, n=24, **model):
        self.folder, self.arch, self.packed = folder, arch, packed
        self.model = tiny.tiny_model(folder / "model", arch, **model)
        self.dataset = trainbed.make_dataset(folder / "data", arch, n, packed=packed)
        self.source = trainbed.make_source(self.model)

    def train(self, name="run", *, attempt=None, stop=None, **sections):
        """Train with the tiny job, changed by ``sections``."""
        sections.setdefault("data", {"packing": self.packed})
        job = trainbed.make_job(self.model, self.folder, **sections)
        self.context = trainbed.make_context(job, self.folder / name, attempt=attempt, stop=stop)
        return train(self.context, self.source, self.dataset)


@pytest.fixture
def bed(tmp_path):
    return Bed(tmp_path)


def check_refused(code, says, call):
    with pytest.raises(JobError, match=says) as caught:
        call()
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize("mxfp4", [False, True])
def test_gpt_oss_learns_with_its_experts(tmp_path, mxfp4):
    """The whole recipe at tiny size: attention and experts, packed, from MXFP4 too."""
    bed = Bed(tmp_path, "gpt_oss", mxfp4=mxfp4)
    adapter = bed.train(
        lora={"dropout": 0, "target_parameters": EXPERTS},
        train={"epochs": 6, "gradient_checkpointing": True},
    )
    history = read_history(adapter.folder / "history.jsonl")
    assert adapter.steps == adapter.planned_steps == len(history) == 18
    assert history[-1]["loss"] < history[0]["loss"] - 0.3
    assert adapter.num_tokens == history[-1]["num_tokens"] == 6 * bed.dataset.num_tokens
    norms = json.loads((adapter.folder / "delta_norms.json").read_text())
    assert {n for n in norms if ".experts." in n} == {f"model.layers.{n}" for n in EXPERTS}
    assert all(norm > 0 for norm in norms.values())
    assert {p.stat().st_mode & 0o777 for p in adapter.folder.glob("adapter*")} == {0o644}
    left = {p.name for p in adapter.folder.iterdir()}
    assert left == {
        ".fingerprint", "adapter_config.json", "adapter_model.safetensors", "artifact.json",
        "delta_norms.json", "history.jsonl", "startup.json",
    }  # fmt: skip


def test_experts_train_grouped_as_they_do_folded(tmp_path):
    """The same losses and deltas by both ways, and the log says which one it was."""
    losses, norms = {}, {}
    for way in ("grouped", "fold"):
        bed = Bed(tmp_path / way, "gpt_oss")
        with capture_logs() as logs:
            adapter = bed.train(
                lora={"dropout": 0, "target_parameters": EXPERTS, "expert_forward": way},
                train={"max_steps": 4, "gradient_checkpointing": True},
            )
        said = [e for e in logs if e["event"] == "expert_lora"]
        assert said == (
            [{"event": "expert_lora", "log_level": "info", "grouped": 2, "folded": 0}]
            if way == "grouped"
            else []
        )
        losses[way] = [line["loss"] for line in read_history(adapter.folder / "history.jsonl")]
        norms[way] = json.loads((adapter.folder / "delta_norms.json").read_text())
    assert losses["grouped"] == pytest.approx(losses["fold"], rel=1e-3)
    assert norms["grouped"] == pytest.approx(norms["fold"], rel=0.05)


def test_the_routers_loss_is_never_inherited(tmp_path):
    """The config says 0.9: a job that says nothing trains on cross-entropy alone."""
    losses = {}
    for coef in (0.0, 0.9):
        bed = Bed(tmp_path / str(coef), "gpt_oss", packed=False)
        assert json.loads((bed.model / "config.json").read_text())["router_aux_loss_coef"] == 0.9
        bed.train(lora={"dropout": 0}, train={"max_steps": 1, "router_aux_loss_coef": coef})
        losses[coef] = read_history(bed.context.work / "train" / "history.jsonl")[0]["loss"]
    assert 4 < losses[0.0] < 8
    # The balance loss of a router that picks 2 experts is about 2.
    assert losses[0.9] - losses[0.0] == pytest.approx(1.8, abs=0.3)


def test_the_first_loss_is_plain_cross_entropy(bed):
    """Against the definition, over the first step's rows, dropout off."""
    bed.train(lora={"dropout": 0}, train={"max_steps": 1, "batch_size": 10})
    got = read_history(bed.context.work / "train" / "history.jsonl")[0]["loss"]
    from job.train.model import load_base

    model, _ = load_base(bed.model, device="cpu")
    total = count = 0
    for ids, labels in trainbed.tokens_of("llama", 24):
        with torch.no_grad():
            scores = model(torch.tensor(ids)[None]).logits[0, :-1].log_softmax(-1)
        for score, label in zip(scores, labels[1:], strict=True):
            if label != -100:
                total, count = total - float(score[label]), count + 1
    assert got == pytest.approx(total / count, rel=1e-5)


def test_packed_and_padded_training_make_the_same_first_step(tmp_path):
    """All examples in one step: loss and gradient norm do not depend on the layout."""
    lines = []
    for packed in (True, False):
        bed = Bed(tmp_path / str(packed), "gpt_oss", packed=packed)
        bed.train(lora={"dropout": 0}, train={"max_steps": 1, "batch_size": 24})
        lines.append(read_history(bed.context.work / "train" / "history.jsonl")[0])
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-5)
    assert lines[0]["grad_norm"] == pytest.approx(lines[1]["grad_norm"], rel=1e-4)
    assert lines[0]["num_tokens"] == lines[1]["num_tokens"]


def test_it_is_reused_and_not_made_twice(bed):
    """Same inputs, settings and versions: no step is made again."""
    first = bed.train(train=SLOWLY)
    saved = bed.context.attempt.saved
    assert saved == [1, 2, 3, 4]
    with capture_logs() as logs:
        assert bed.train(train=SLOWLY) == first
    assert [event["event"] for event in logs] == ["artifact_reused"]


def test_a_finished_training_is_not_trained_again_elsewhere(bed):
    """A pod that lost its disk after the last step takes the last checkpoint, bit by bit."""
    first = bed.train(train={"max_steps": 3})
    attempt = trainbed.FolderAttempt(bed.context.attempt.folder)
    again = bed.train("elsewhere", attempt=attempt, train={"max_steps": 3})
    assert again.sha256 == first.sha256
    assert again.num_tokens == first.num_tokens
    assert again.final_loss == first.final_loss
    assert attempt.saved == []


def test_sigterm_saves_and_ends_with_75(bed):
    """Never a normal return: what follows would publish half an adapter."""
    stop = Stop()

    class Stopping(trainbed.FolderAttempt):
        def save_checkpoint(self, folder, step):
            super().save_checkpoint(folder, step)
            if step == 1:
                stop.request(preempted("SIGTERM"))

    attempt = Stopping(bed.folder / "store")
    check_refused(
        ExitCode.PREEMPTED,
        "SIGTERM",
        lambda: bed.train(attempt=attempt, stop=stop, train=SLOWLY),
    )
    assert attempt.saved == [1]
    assert not (bed.context.work / "train").exists()


def test_a_stop_between_checkpoints_saves_first(bed, monkeypatch):
    """Asked in the middle of an accumulation: the step is finished, saved, and then it ends."""
    stop = Stop()
    calls = []

    def beat(self, args, state, control, **_):
        calls.append(state.global_step)
        if len(calls) == 2:
            stop.request(preempted("SIGTERM"))

    monkeypatch.setattr("job.train.callbacks.Life.on_substep_end", beat)
    attempt = trainbed.FolderAttempt(bed.folder / "store")
    check_refused(ExitCode.PREEMPTED, "SIGTERM", lambda: bed.train(attempt=attempt, stop=stop))
    assert attempt.saved == [2]


def test_a_fenced_attempt_writes_nothing(bed, monkeypatch):
    """A newer attempt owns the run: 76, and no checkpoint."""
    stop = Stop()
    fence = JobError(ExitCode.FENCED, "run", "a newer attempt owns it", "leave it alone")
    monkeypatch.setattr(
        "job.train.callbacks.Life.on_substep_end", lambda *_, **__: stop.request(fence)
    )
    attempt = trainbed.FolderAttempt(bed.folder / "store")
    check_refused(ExitCode.FENCED, "newer attempt", lambda: bed.train(attempt=attempt, stop=stop))
    assert attempt.saved == []


def test_max_duration_ends_early_and_says_so(bed):
    """Over all attempts; what there is, is an adapter; the last checkpoint knows it is over."""
    with capture_logs() as logs:
        adapter = bed.train(train={"max_steps": 5000, "max_duration_s": 0.5})
    assert 0 < adapter.steps < 5000 == adapter.planned_steps
    reasons = [e["reason"] for e in logs if e["event"] == "training_ended_early"]
    assert reasons == ["train.max_duration_s: 0.5"]
    attempt = trainbed.FolderAttempt(bed.context.attempt.folder)
    again = bed.train(
        "elsewhere", attempt=attempt, train={"max_steps": 5000, "max_duration_s": 0.5}
    )
    assert (again.sha256, again.steps) == (adapter.sha256, adapter.steps)


def test_max_duration_counts_earlier_attempts(bed):
    """Time spent before a kill is spent."""
    settings = {"max_steps": 50, "max_duration_s": 1000, "checkpoint_every_steps": 1}
    stop = Stop()

    class Stopping(trainbed.FolderAttempt):
        def save_checkpoint(self, folder, step):
            state = json.loads((folder / "checkpoint.json").read_text())
            state["duration_s"] += 2000
            (folder / "checkpoint.json").write_text(json.dumps(state))
            super().save_checkpoint(folder, step)
            stop.request(preempted("SIGTERM"))

    attempt = Stopping(bed.folder / "store")
    check_refused(
        ExitCode.PREEMPTED, "SIGTERM", lambda: bed.train(attempt=attempt, stop=stop, train=settings)
    )
    attempt = trainbed.FolderAttempt(bed.folder / "store")
    adapter = bed.train("again", attempt=attempt, train=settings)
    assert adapter.steps == 2
    assert adapter.duration_s > 2000


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"train": {**SLOWLY, "learning_rate": 1e-3}}, "train"),
        ({"lora": {"rank": 2}, "train": SLOWLY}, "lora"),
        ({"seed": 4, "train": SLOWLY}, "seed"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(bed, sections, part):
    """65, naming what has changed."""
    bed.train(train=SLOWLY)
    attempt = trainbed.FolderAttempt(bed.context.attempt.folder)
    error = check_refused(
        ExitCode.DATA,
        f"changed since then: {part};",
        lambda: bed.train("again", attempt=attempt, **sections),
    )
    assert "\n" not in str(error)
    assert attempt.saved == []


def test_what_a_checkpoint_depends_on_has_names(bed, tmp_path):
    """Data, tokenizer, base and versions count; how often it is saved does not."""
    job = trainbed.make_job(bed.model, tmp_path)
    parts = fingerprints(job, bed.source, bed.dataset)
    often = trainbed.make_job(bed.model, tmp_path, train={"checkpoint_every_s": 1})
    assert fingerprints(often, bed.source, bed.dataset) == parts
    (bed.dataset.folder / "tokenizer" / "chat_template.jinja").write_text("other")
    other = bed.dataset.model_copy(update={"digest": "0"})
    source = bed.source.model_copy(update={"files": {"model.safetensors": "0"}})
    changed = fingerprints(job, source, other)
    assert {k for k in parts if parts[k] != changed[k]} == {"data", "tokenizer", "model"}
    assert "torch" in parts["versions"]


def test_a_damaged_checkpoint_is_refused(bed):
    """Not half restored: moments that can't be read are 65, never a fresh optimiser."""
    stop = Stop()

    class Damaging(trainbed.FolderAttempt):
        def save_checkpoint(self, folder, step):
            super().save_checkpoint(folder, step)
            next(self.folder.glob("*/optimizer.safetensors")).write_bytes(b"short")
            stop.request(preempted("SIGTERM"))

    attempt = Damaging(bed.folder / "store")
    check_refused(
        ExitCode.PREEMPTED, "SIGTERM", lambda: bed.train(attempt=attempt, stop=stop, train=SLOWLY)
    )
    attempt = trainbed.FolderAttempt(bed.folder / "store")
    check_refused(
        ExitCode.DATA, "optimizer", lambda: bed.train("again", attempt=attempt, train=SLOWLY)
    )


def test_nothing_in_a_checkpoint_is_pickled(bed):
    """Safetensors and JSON alone."""
    bed.train(train=SLOWLY)
    newest = max(bed.context.attempt.folder.iterdir())
    assert {p.name for p in newest.iterdir()} == {
        "weights.safetensors", "optimizer.safetensors", "checkpoint.json", "trainer_state.json",
        "history.jsonl",
    }  # fmt: skip
    for path in newest.glob("*.json"):
        json.loads(path.read_text())


def test_a_loss_that_is_not_finite_stops_the_run(bed):
    """70 before the weights are touched, and no checkpoint of them."""
    path = bed.model / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    bed.packed = False
    bed.dataset = trainbed.make_dataset(bed.folder / "data", "llama", 8, packed=False)
    check_refused(ExitCode.NOT_PROVEN, "step 1: the loss is nan", lambda: bed.train(train=SLOWLY))
    assert bed.context.attempt.saved == []


def test_an_adapter_without_a_gradient_stops_the_run(bed, monkeypatch):
    """The first step names adapters that nothing uses, whatever the loss does."""
    from peft.tuners.lora import Linear

    real = Linear.forward

    def forward(self, x, *args, **kwargs):
        return self.base_layer(x) if self.out_features == 96 else real(self, x, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", forward)
    check_refused(
        ExitCode.NOT_PROVEN,
        r"no gradient reaches lora_B of 4 adapter\(s\): model.layers.0.mlp.gate_proj.weight",
        lambda: bed.train(train=SLOWLY),
    )


def test_lora_a_is_checked_after_the_first_update(bed, monkeypatch):
    """lora_B learns and lora_A does not: that too is an adapter half dead."""
    from job.train import callbacks

    asked = []
    monkeypatch.setattr(callbacks, "require_gradients", lambda _, which: asked.append(which))
    bed.train(train=SLOWLY)
    assert asked == ["lora_B", "lora_A"]


def test_a_leak_found_by_the_preflight_trains_unpacked(bed, monkeypatch):
    """One logged reason, one example a row, the same examples."""
    monkeypatch.setattr("job.train.fit.packing_fault", lambda *_: "it leaks")
    with capture_logs() as logs:
        adapter = bed.train()
    assert [e["reason"] for e in logs if e["event"] == "packing_refused"] == ["it leaks"]
    assert adapter.planned_steps == 6
    assert adapter.num_tokens == bed.dataset.num_tokens


def test_a_name_the_model_lacks_and_a_router_it_lacks_are_config_errors(bed):
    """78 before any step, and nothing half-written that a later stage could take."""
    check_refused(
        ExitCode.CONFIG,
        "the model has no 1.mlp.experts",
        lambda: bed.train(lora={"dropout": 0, "target_parameters": EXPERTS}),
    )
    check_refused(
        ExitCode.CONFIG,
        "llama has no router",
        lambda: bed.train(train={"router_aux_loss_coef": 0.1}),
    )
    assert not (bed.context.work / "train").exists()


@pytest.mark.parametrize(
    ("error", "settings", "mend"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), {}, "gradient_checkpointing: true"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            {"gradient_checkpointing": True},
            "batch_size: 1 and train.gradient_accumulation: 4",
        ),
    ],
)
def test_out_of_memory_names_the_terms_and_the_setting(bed, monkeypatch, error, settings, mend):
    """71: where the memory went, and what to change."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("job.train.trainer.summed_loss", fail)
    said = check_refused(
        ExitCode.OUT_OF_RESOURCES, "activations .* GB", lambda: bed.train(train=settings)
    )
    assert mend in said.do


@pytest.mark.parametrize(
    "words",
    ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"],
)
def test_memory_that_torch_does_not_count_runs_out_too(bed, monkeypatch, words):
    """CuBLAS and Triton take theirs beside torch, and say so in words of their own."""

    def fail(*_, **__):
        raise RuntimeError(words)

    monkeypatch.setattr("job.train.trainer.summed_loss", fail)
    check_refused(ExitCode.OUT_OF_RESOURCES, "out of memory", bed.train)


def test_the_base_is_let_go_once_it_is_trained(bed, monkeypatch):
    """The judge loads one of its own: two would not fit where one does."""
    import weakref

    from job.train import fit

    kept, real = [], fit.load_base

    def load(*arguments, **settings):
        base, attention = real(*arguments, **settings)
        kept.append(weakref.ref(base))
        return base, attention

    monkeypatch.setattr(fit, "load_base", load)
    bed.train(train={"epochs": 1})
    assert [it() for it in kept] == [None]


def test_several_gpus_and_one_process_do_not_split_its_batches(bed, monkeypatch):
    """Transformers would wrap the model in DataParallel, which TRL refuses."""
    from transformers import TrainingArguments

    from job.train import trainer

    whole = trainer._arguments

    def sees_two(*arguments, **settings):
        args = whole(*arguments, **settings)
        args._n_gpu = 2
        return args

    monkeypatch.setattr(trainer, "_arguments", sees_two)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self._n_gpu))
    adapter = bed.train(train={"epochs": 1})
    assert adapter.steps > 0


def test_other_errors_stay_bugs(bed, monkeypatch):
    """A RuntimeError that is not memory is nobody's mistake but ours."""

    def fail(*_, **__):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr("job.train.trainer.summed_loss", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        bed.train()


def test_stdout_is_for_data(bed, capsys):
    """Neither the Trainer nor TRL prints there."""
    with capture_logs():
        bed.train(train=SLOWLY)
    assert capsys.readouterr().out == ""


def test_the_bases_config_is_left_alone(bed):
    """Training changes use_cache and the router's loss in memory: never on disk."""
    before = {p.name: p.read_bytes() for p in bed.model.iterdir()}
    bed.train(train=SLOWLY)
    assert {p.name: p.read_bytes() for p in bed.model.iterdir()} == before


def test_progress_and_history_have_the_figures(bed):
    """What head.json, the watchdog and the report read."""
    bed.train(train=SLOWLY)
    shown = bed.context.progress.snapshot()
    assert {"step": 4, "num_steps": 4}.items() <= shown.items()
    assert {"loss", "tokens_per_s", "eta_s"} <= shown.keys()
    assert shown["save_s"] > 0
    line = read_history(bed.context.work / "train" / "history.jsonl")[-1]
    assert {"step", "loss", "learning_rate", "grad_norm", "padding", "memory_gb"} <= line.keys()
    assert 0 <= line["padding"] < 1


def test_trackers_get_every_step_and_an_end(bed, monkeypatch):
    """Those of job.track, with the step's figures."""
    seen = []

    class Tracker:
        def log(self, step, figures):
            seen.append((step, figures["loss"]))

        def end(self):
            seen.append("ended")

    monkeypatch.setattr("job.train.fit.make_trackers", lambda *_: [Tracker()])
    bed.train(train=SLOWLY, track={"tensorboard": {}})
    assert [entry[0] for entry in seen[:-1]] == [1, 2, 3, 4]
    assert seen[-1] == "ended"


@pytest.mark.parametrize("scheduler", ["cosine_with_min_lr", "cosine", "linear", "constant"])
def test_every_scheduler_of_the_job_file_runs(bed, scheduler):
    """And a run of a few steps has none at a learning rate of zero."""
    bed.train(train={"max_steps": 2, "scheduler": scheduler})
    lines = read_history(bed.context.work / "train" / "history.jsonl")
    assert lines[0]["learning_rate"] == 1e-2


def test_what_cannot_be_is_told_before_the_weights_are_read(bed, monkeypatch):
    """Names and a router that the model lacks, from its config alone."""
    monkeypatch.setattr("job.train.fit._load", lambda *_: pytest.fail("the weights were read"))
    for setting, sections in (
        ("target_parameters", {"lora": {"dropout": 0, "target_parameters": EXPERTS}}),
        ("router_aux_loss_coef", {"train": {"router_aux_loss_coef": 0.1}}),
    ):
        check_refused(ExitCode.CONFIG, setting, lambda sections=sections: bed.train(**sections))


def test_out_of_memory_before_the_first_step_is_told_too(bed, monkeypatch):
    """The packing check computes, so it can run out as well."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr("job.train.fit.packing_fault", fail)
    check_refused(ExitCode.OUT_OF_RESOURCES, "base .* GB", bed.train)


def test_what_is_compiled_for_a_gpu_stays_in_the_cache(bed, tmp_path, monkeypatch):
    """Triton's and Inductor's folders lie in the cache that outlives the pod."""
    from types import SimpleNamespace

    from job.train.stage import _keep_compiled

    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    for name in names:
        monkeypatch.setenv(name, "/home/job/.cache")
    _keep_compiled(SimpleNamespace(cache=tmp_path, job=SimpleNamespace(device="cpu")))
    assert all(os.environ[name] == "/home/job/.cache" for name in names)
    _keep_compiled(SimpleNamespace(cache=tmp_path, job=SimpleNamespace(device="cuda")))
    assert all(Path(os.environ[name]).parent == tmp_path / "compiled" for name in names)


def test_a_cold_folder_begins_with_the_kernels_of_the_image(tmp_path, monkeypatch):
    """Copied whole, and never over what is there."""
    from types import SimpleNamespace

    from job.train import stage

    baked, home = tmp_path / "image", tmp_path / "home"
    (baked / "triton/hash").mkdir(parents=True)
    (baked / "triton/hash/kernel.cubin").write_bytes(b"new")
    monkeypatch.setattr(stage, "BAKED", baked)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(home / "triton"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    context = SimpleNamespace(cache=None, job=SimpleNamespace(device="cuda"))
    stage._keep_compiled(context)
    kernel = home / "triton/hash/kernel.cubin"
    assert kernel.read_bytes() == b"new"
    assert [it.name for it in home.iterdir()] == ["triton"]
    kernel.write_bytes(b"its own")
    stage._keep_compiled(context)
    assert kernel.read_bytes() == b"its own"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
