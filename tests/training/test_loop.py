"""What training stages share: checkpoints and the best result through kills, DeepSpeed, workers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from ranks import offer_losses, on_ranks
from safetensors.torch import load_file
from tiny import plain_nano
from tiny_artifacts import join_families, make_artifacts

from nla_ray.run.artifact import Run
from nla_ray.run.identity import document_half
from nla_ray.settings.config import (
    CaptureConfig,
    ComputeConfig,
    LoraSettings,
    ReconstructorConfig,
    SFTConfig,
)
from nla_ray.settings.fit import worker_batch
from nla_ray.settings.presets import preset
from nla_ray.training.batches import LengthBatches
from nla_ray.training.checkpoints import TRAINED_NAME, Checkpoints, last_checkpoint
from nla_ray.training.workers import collect_result, run_training
from nla_ray.training.zero import deepspeed_config


def run_in(folder: Path | str, **compute) -> Run:
    return Run(
        dataclasses.replace(
            plain_nano(), run_dir=str(folder), compute=ComputeConfig(threads=1, **compute)
        )
    )


def make_checkpoint(checkpoints: Checkpoints, step: int, *, complete: bool = True) -> None:
    """What a trainer writes, and what its callback does then."""
    folder = checkpoints.folder / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(f"state of {step}")
    if complete:
        (folder / TRAINED_NAME).write_text(f"weights of {step}")
        checkpoints.drop_superseded()
        checkpoints.upload()


# Order of batches ---------------------------------------------------------------------------------


def test_batches_hold_like_lengths_and_every_example_once_in_an_order_of_seed_and_epoch() -> None:
    lengths = [(index * 37) % 101 for index in range(203)]
    sampler = LengthBatches(lengths, 8, seed=1)
    order = list(sampler)
    assert sorted(order[:203]) == list(range(203))
    assert order[203:] == [203, 204, 205, 206, 207], "blanks fill up the last of 26 batches"
    assert len(sampler) == 208 and sampler.num_blanks == 5
    batches = [order[start : start + 8] for start in range(0, 200, 8)]
    spread = [
        max(lengths[index] for index in batch) - min(lengths[index] for index in batch)
        for batch in batches
    ]
    assert sum(spread) / len(spread) < 20
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts != sorted(firsts)
    assert list(LengthBatches(lengths, 8, seed=1)) == order
    sampler.set_epoch(1)
    assert list(sampler) != order and list(LengthBatches(lengths, 8, seed=2)) != order


# Checkpoints --------------------------------------------------------------------------------------


def test_the_last_checkpoint_is_the_newest_complete_one_and_a_new_process_drops_the_others(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(run_in(tmp_path).config, "sft")
    assert checkpoints.last() is None
    for step, complete in ((9, True), (10, True), (200, False)):
        make_checkpoint(checkpoints, step, complete=complete)
    assert last_checkpoint(checkpoints.folder) == checkpoints.folder / "checkpoint-10"
    again = Checkpoints(run_in(tmp_path).config, "sft")
    assert again.last() == str(checkpoints.folder / "checkpoint-10")
    assert [path.name for path in checkpoints.folder.glob("checkpoint-*")] == ["checkpoint-10"]


def test_ranks_whose_losses_differ_in_the_last_bit_keep_the_same_offers(tmp_path: Path) -> None:
    losses = [0.5, 0.25, 0.25]
    run_dir, other_losses = str(tmp_path / "run"), [0.5, 0.25, math.nextafter(0.25, 0)]
    kept = on_ranks(offer_losses, tmp_path, [(run_dir, losses), (run_dir, other_losses)])
    assert kept == [[True, True, False]] * 2


def test_only_a_better_offer_replaces_the_best_and_a_new_process_knows_it(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    checkpoints = Checkpoints(run.config, "sft")

    def offer(step: int, value: float) -> bool:
        return checkpoints.offer(
            step,
            value,
            lambda folder: (folder / "adapter").write_text(f"step {step}"),
            metrics={"loss": value},
        )

    assert (
        offer(1, 0.5)
        and not offer(2, 0.5)
        and offer(3, 0.4)
        and not offer(4, 0.6)
        and not offer(5, float("nan"))
    )
    checkpoints = Checkpoints(run.config, "sft")
    folder = checkpoints.best["folder"]
    assert checkpoints.best == {"step": 3, "value": 0.4, "folder": folder, "metrics": {"loss": 0.4}}
    assert not offer(6, 0.45)
    assert [path.name for path in checkpoints.folder.glob("best-*")] == [folder]
    checkpoints.metrics_log().append({"step": 1})
    collect_result(run, "sft")
    assert (tmp_path / "sft" / "adapter").read_text() == "step 3"
    assert (tmp_path / "sft" / "metrics.jsonl").exists()


def test_a_kill_while_the_best_is_being_saved_leaves_the_one_before(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    checkpoints = Checkpoints(run.config, "sft")
    checkpoints.offer(1, 0.5, lambda folder: (folder / "adapter").write_text("whole"))

    def dies(folder: Path) -> None:
        (folder / "adapter").write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.offer(2, 0.4, dies)
    checkpoints = Checkpoints(run.config, "sft")
    checkpoints.metrics_log().append({"step": 1})
    assert len(list(checkpoints.folder.glob("best-*"))) == 1, "what is torn is dropped"
    collect_result(run, "sft")
    assert checkpoints.best["step"] == 1 and (tmp_path / "sft" / "adapter").read_text() == "whole"


def test_a_training_without_a_result_is_a_broken_promise(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"best\.json"):
        collect_result(run_in(tmp_path), "sft")


def test_metrics_after_the_checkpoint_that_training_resumes_from_are_written_again(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(run_in(tmp_path).config, "sft")
    log = checkpoints.metrics_log()
    for step in (2, 4, 6):
        log.append({"step": step})
    make_checkpoint(checkpoints, 4)
    assert [record["step"] for record in checkpoints.metrics_log().read()] == [2, 4]


def test_a_remote_run_gets_every_checkpoint_and_another_machine_goes_on_from_it(s3_uri) -> None:
    run = run_in(s3_uri("loop-test"))
    scratch = run.root / "grpo" / "scratch"
    first = Checkpoints(run.config, "grpo")
    assert first.folder.exists() and not first.location.is_local
    make_checkpoint(first, 5)
    first.metrics_log().append({"step": 5})
    first.offer(5, 0.5, lambda folder: (folder / "adapter").write_text("five"))
    make_checkpoint(first, 10)
    torn = first.folder / "checkpoint-15"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("half")
    first.upload()  # and the machine is lost

    with Checkpoints(run.config, "grpo") as second:
        assert second.folder != first.folder
        assert second.last() == str(second.folder / "checkpoint-10")
        assert (second.folder / "checkpoint-10" / TRAINED_NAME).read_text() == "weights of 10"
        assert second.best["step"] == 5
        second.offer(12, 0.3, lambda folder: (folder / "adapter").write_text("twelve"))
    assert not second.folder.exists()
    assert scratch.list_files() == [
        f"{second.best['folder']}/adapter",
        "best.json",
        "checkpoint-10/trained.safetensors",
        "checkpoint-10/trainer_state.json",
        "metrics.jsonl",
    ], "nothing torn and nothing superseded stays in the store"
    collect_result(run, "grpo")
    assert (run.root / "grpo" / "adapter").read_text() == "twelve"


def test_only_the_first_rank_of_a_remote_run_writes_and_no_rank_leaves_a_folder(
    s3_uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(s3_uri("ranks-test"))
    with Checkpoints(run.config, "sft") as first:
        make_checkpoint(first, 5)
        first.offer(5, 0.5, lambda folder: (folder / "adapter").write_text("five"))
        first.metrics_log().append({"step": 5})
    files = (run.root / "sft" / "scratch").list_files()

    monkeypatch.setenv("RANK", "1")
    with Checkpoints(run.config, "sft") as second:
        assert second.last() == str(second.folder / "checkpoint-5")
        assert second.best["step"] == 5
        assert sorted(path.name for path in second.folder.rglob("*") if path.is_file()) == [
            "best.json",
            TRAINED_NAME,
            "trainer_state.json",
        ], "no more than it resumes from"
        assert second.offer(7, 0.4, lambda folder: (folder / "adapter").write_text("seven"))
        (second.folder / "stray").write_text("written by a library")
        second.upload()
    assert not second.folder.exists()
    assert (run.root / "sft" / "scratch").list_files() == files


# DeepSpeed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_the_configured_zero_stage_is_asked_for(stage: int) -> None:
    assert deepspeed_config(ComputeConfig(zero_stage=stage))["zero_optimization"]["stage"] == stage


def test_stage_zero_is_training_without_deepspeed() -> None:
    assert deepspeed_config(ComputeConfig(zero_stage=0)) is None


def test_zero_on_a_cpu_compiles_nothing_and_so_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {"deepspeed_shm_comm": True})
    assert (
        deepspeed_config(ComputeConfig(zero_stage=2, trainer_workers=2))["zero_optimization"][
            "stage"
        ]
        == 2
    )
    assert build_shm_op() is None


# In Ray Train workers -----------------------------------------------------------------------------


def test_a_request_that_no_node_can_meet_is_refused_before_it_waits(
    ray_cluster, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="trainer"):
        run_training(run_in(tmp_path, trainer_cpus=1000), "sft", print, {})


def test_a_worker_that_is_killed_goes_on_from_its_last_complete_checkpoint(
    ray_cluster, tmp_path: Path
) -> None:
    def work(config: dict) -> dict:
        import os
        import signal

        from nla_ray.training.checkpoints import Checkpoints

        checkpoints = Checkpoints(config["run"], config["name"])
        found = checkpoints.last()
        with open(config["starts"], "a") as file:
            file.write(f"{os.getpid()} {Path(found).name if found else None}\n")
        if found is None:
            (checkpoints.folder / "checkpoint-3").mkdir()
            (checkpoints.folder / "checkpoint-3" / "trained.safetensors").touch()
            (checkpoints.folder / "checkpoint-6").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.metrics_log().append({"step": 6})
        checkpoints.offer(6, 0.5, lambda folder: (folder / "adapter").write_text("done"))
        return {"answer": config["answer"]}

    run, starts = run_in(tmp_path / "run", trainer_cpus=0.5), tmp_path / "starts"
    assert run_training(run, "sft", work, {"starts": str(starts), "answer": 7}) == {"answer": 7}
    (first, from_nothing), (second, from_checkpoint) = [
        line.split() for line in starts.read_text().splitlines()
    ]
    assert (from_nothing, from_checkpoint) == ("None", "checkpoint-3") and first != second
    assert (tmp_path / "run" / "sft" / "adapter").read_text() == "done"


@pytest.fixture(scope="module")
def stage_run(ray_cluster, tiny_base, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Activations and labels of a tiny corpus; nothing trained yet. ZeRO-2."""
    lora = LoraSettings(rank=4, alpha=8)
    scorer = ReconstructorConfig(
        lora=lora, epochs=2, batch_size=8, learning_rate=1e-2, teacher_share=1.0
    )
    config = dataclasses.replace(
        plain_nano(),
        run_dir=str(tmp_path_factory.mktemp("stages")),
        base=tiny_base,
        sft=SFTConfig(lora=lora, epochs=3, batch_size=8),
        reward_scorer=scorer,
        judge_scorer=dataclasses.replace(scorer, document_half="odd"),
        compute=ComputeConfig(threads=1, capture_cpus=0.5, trainer_cpus=0.5),
    )
    run = Run(config)
    make_artifacts(run, verbalizers=())
    for name in ("reward_scorer", "judge_scorer"):
        (run.root / name).delete()
    return run


def twin_of(run: Run, folder: Path, **compute: int) -> Run:
    """The same run elsewhere, on the same activations and labels, with other workers."""
    for name in ("activations", "labels", "corpus"):
        (folder / name).symlink_to(Path(run.root.path) / name)
    compute = dataclasses.replace(run.config.compute, **compute)
    return Run(dataclasses.replace(run.config, run_dir=str(folder), compute=compute))


def kill_worker_after_first_checkpoint(scratch: Path) -> threading.Thread:
    """Kills the Ray Train worker of this process's Ray as soon as a checkpoint is complete."""

    def watch() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and last_checkpoint(scratch) is None:
            time.sleep(0.02)
        for process in psutil.Process(os.getpid()).children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def relative_difference(first: Path, second: Path) -> float:
    """Mean absolute difference of two files of weights over their mean size."""
    weights, expected = load_file(first), load_file(second)
    assert weights.keys() == expected.keys()
    difference = sum((weights[name] - expected[name]).abs().sum().item() for name in weights)
    return difference / sum(tensor.abs().sum().item() for tensor in expected.values())


ADAPTER = "sft/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def plain_adapter(stage_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SFT adapter that one process makes without DeepSpeed."""
    from nla_ray.training import sft

    twin = twin_of(stage_run, tmp_path_factory.mktemp("plain"), zero_stage=0)
    sft._train({"run": twin.config, "name": "sft"})
    collect_result(twin, "sft")
    return Path(twin.root.path) / ADAPTER


def test_sft_in_a_ray_worker_under_zero_2_survives_its_worker_and_equals_the_plain_loop(
    stage_run: Run, plain_adapter: Path
) -> None:
    from nla_ray.training import sft

    killer = kill_worker_after_first_checkpoint(Path(stage_run.root.path) / "sft" / "scratch")
    manifest = sft.train_sft(stage_run)
    killer.join()
    assert set(manifest.files) == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "metrics.jsonl",
    }
    assert not (stage_run.root / "sft" / "scratch").exists()
    assert sft.train_sft(stage_run) == manifest
    assert manifest.model["layer"] == 1 and manifest.metrics["examples"] == 48
    assert not set(manifest.documents["train"]) & set(manifest.documents["validation"])
    steps = [
        json.loads(line)["step"]
        for line in (stage_run.root / "sft" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)
    assert relative_difference(Path(stage_run.root.path) / ADAPTER, plain_adapter) < 1e-3


def test_two_workers_share_every_step_and_learn_what_one_learns(
    stage_run: Run, plain_adapter: Path, tmp_path: Path
) -> None:
    from nla_ray.training import sft

    pair = twin_of(stage_run, tmp_path, zero_stage=2, trainer_workers=2)
    manifest = sft.train_sft(pair)
    assert manifest.metrics["best_step"] % 6 == 0, (
        "48 examples are six steps of eight, whatever the number of workers"
    )
    assert relative_difference(tmp_path / ADAPTER, plain_adapter) < 1e-3


def test_every_training_stage_is_built_from_the_7b_preset_at_reduced_width(
    ray_cluster: None, tmp_path: Path
) -> None:
    from tiny import make_tiny_base

    from nla_ray.activation.stage import load_activations
    from nla_ray.base.load import load_tokenizer
    from nla_ray.base.prompts import build_injection_prompt
    from nla_ray.reinforce import grpo
    from nla_ray.training import reconstruction, sft

    seven_b = preset("qwen2.5-7b")
    plan = deepspeed_config(seven_b.compute)["zero_optimization"]
    assert plan["stage"] == 2 and plan["overlap_comm"]
    tiny = make_tiny_base(tmp_path / "base", blocks=28, width=112, heads=28, key_value_heads=4)
    few = {"epochs": 1, "max_examples": 32}
    config = dataclasses.replace(
        seven_b,
        run_dir=str(tmp_path / "run"),
        base=dataclasses.replace(seven_b.base, model=tiny.model, max_tokens=256, device="cpu"),
        capture=CaptureConfig(),
        sft=dataclasses.replace(seven_b.sft, **few),
        reward_scorer=dataclasses.replace(seven_b.reward_scorer, **few),
        judge_scorer=dataclasses.replace(seven_b.judge_scorer, **few),
        compute=ComputeConfig(threads=1, zero_stage=0),
    )
    run = Run(config)
    make_artifacts(run, verbalizers=("sft",))
    assert (
        run.find("activations").model["layer"] == 20
        and load_activations(run, "train").vectors.shape[1] == 112
    )
    for name, result in (
        ("reward_scorer", reconstruction._train({"run": config, "name": "reward_scorer"})),
        ("sft", sft._train({"run": config, "name": "sft"})),
    ):
        assert result["metrics"]["examples"] > 0 and result["metrics"]["eval_loss"] > 0, name
    prompt = build_injection_prompt(load_tokenizer(config.base), config.base.marker)
    data = grpo.TrainingData(
        schedule=[],
        sources={},
        wrong=None,
        monitor=None,
        bank=load_activations(run, "train").vectors.numpy(),
    )
    policy = grpo.load_policy(config, data, prompt)
    vocab_size = policy.get_input_embeddings().vocab_size
    logits = policy(input_ids=torch.tensor([prompt.encode(0, vocab_size)])).logits
    assert logits.shape == (1, len(prompt), vocab_size) and logits.isfinite().all()
    arguments = grpo.grpo_arguments(config, tmp_path, [1.0] * 6)
    assert arguments.generation_batch_size == 16 * 8 and arguments.learning_rate == 1.4e-5


def test_a_batch_that_workers_cannot_share_evenly_is_refused() -> None:
    assert worker_batch(ComputeConfig(trainer_workers=2), 64) == 32
    with pytest.raises(
        ValueError, match=r"batch_size: got 9, expected a multiple of compute\.trainer_workers = 2"
    ):
        worker_batch(ComputeConfig(trainer_workers=2), 9)


def test_a_scorer_in_a_ray_worker_under_zero_3_equals_the_plain_loop(
    stage_run: Run, tmp_path: Path
) -> None:
    from nla_ray.training import reconstruction

    spread = dataclasses.replace(
        stage_run.config, compute=dataclasses.replace(stage_run.config.compute, zero_stage=3)
    )
    manifest = reconstruction.train_scorer(Run(spread), "reward_scorer")
    assert {document_half(doc_id) for doc_id in manifest.documents["train"]} == {"even"}
    assert set(manifest.files) == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "head.safetensors",
        "metrics.jsonl",
    }

    twin = twin_of(stage_run, tmp_path, zero_stage=0)
    result = reconstruction._train({"run": twin.config, "name": "reward_scorer"})
    collect_result(twin, "reward_scorer")
    assert manifest.metrics["eval_cosine"] == pytest.approx(
        result["metrics"]["eval_cosine"], abs=1e-3
    )
    for file in ("adapter/adapter_model.safetensors", "head.safetensors"):
        assert (
            relative_difference(
                Path(stage_run.root.path) / "reward_scorer" / file,
                tmp_path / "reward_scorer" / file,
            )
            < 0.01
        )


def test_the_two_scorers_learn_from_disjoint_documents(stage_run: Run) -> None:
    from nla_ray.training.reconstruction import load_examples

    config = stage_run.config
    parts = [
        set(load_examples(stage_run, split, settings).doc_ids)
        for settings in (config.reward_scorer, config.judge_scorer)
        for split in ("train", "validation")
    ]
    assert all(
        not first & second for index, first in enumerate(parts) for second in parts[index + 1 :]
    )


def test_the_documents_of_a_family_are_in_one_scorers_half(stage_run: Run, tmp_path: Path) -> None:
    from nla_ray.activation.stage import load_activations
    from nla_ray.training.reconstruction import load_examples

    twin = twin_of(stage_run, tmp_path)
    (tmp_path / "corpus").unlink()
    shutil.copytree(Path(stage_run.root.path) / "corpus", tmp_path / "corpus")
    train = sorted(set(load_activations(twin, "train").doc_ids))
    assert {document_half(doc_id) for doc_id in train[:6]} == {"even", "odd"}
    join_families(twin, dict.fromkeys(train[:6], "joined"))
    for settings in (twin.config.reward_scorer, twin.config.judge_scorer):
        examples = load_examples(twin, "train", settings)
        is_half = document_half("joined") == settings.document_half
        assert set(examples.doc_ids) & set(train[:6]) == (set(train[:6]) if is_half else set())
        assert set(examples.family_ids) == {
            family
            for family in ("joined", *train[6:])
            if document_half(family) == settings.document_half
        }


def test_every_label_of_a_text_can_be_learned_with_its_activation(
    stage_run: Run, tmp_path: Path
) -> None:
    from nla_ray.label.stage import label_texts, load_labels
    from nla_ray.training.reconstruction import load_examples
    from nla_ray.training.sft import load_pairs

    twin = twin_of(stage_run, tmp_path)
    (tmp_path / "labels").unlink()
    label_texts(twin)  # by two teachers
    wanted = sorted(row["label"] for row in load_labels(twin, "train"))
    pairs = load_pairs(twin, "train", limit=None, seed=0, first_row=3, every_label=True)
    assert sorted(pairs.labels) == wanted and pairs.rows == list(range(3, 3 + len(wanted)))
    halves = [
        load_examples(twin, "train", dataclasses.replace(settings, labels="all"))
        for settings in (twin.config.reward_scorer, twin.config.judge_scorer)
    ]
    assert sorted(text for half in halves for text in half.descriptions) == wanted
    drawn = load_pairs(twin, "train", limit=None, seed=0, first_row=0)
    assert 2 * len(drawn.labels) == len(wanted)
    for label, vector in zip(drawn.labels, drawn.vectors, strict=True):
        rows = [row for row, text in enumerate(pairs.labels) if text == label]
        assert any(torch.equal(vector, pairs.vectors[row]) for row in rows)
