"""Model cards: what the files of a run say, in the form of the hub, without paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData

from medalign import config as configuration
from medalign.checkpoint import export
from medalign.checkpoint.state import TrainState, write_state
from medalign.cli.main import main
from medalign.config import LoraConfig, StudentConfig
from medalign.data.shards.writer import write_shards
from medalign.evaluation.metrics import Prediction, score
from medalign.evaluation.provenance import describe_weights
from medalign.model_card import CARD, build_card, collect_facts
from medalign.phantom.records import records
from medalign.run_folder import RunFolder
from medalign.student.loading import load_student


@pytest.fixture(scope="module")
def run(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint and three evaluations: of these weights, of others, and without provenance."""
    root = tmp_path_factory.mktemp("secret-place")
    run = root / "runs" / "mine"
    checkpoint = RunFolder(run).checkpoints.step(8)
    checkpoint.path.mkdir(parents=True)
    student_config = StudentConfig(path=str(student_folder), layer=2, lora=LoraConfig(rank=4))
    student = load_student(student_config, torch.float32)
    whole = {name: p.detach() for named in student.trainable().values() for name, p in named}
    export.write_export(student, whole, student_config, 160, checkpoint.export)
    words = [f"--student.path={student_folder}", f"--data.train={root}/cohort", "--run.dir=runs/mine"]
    words += [f"--teacher.path={root}/a-teacher", f"--teacher.also=[{{path: {root}/another-teacher}}]"]
    checkpoint.config.write_text(configuration.dump(configuration.load("phantom", words)))
    write_state(checkpoint.path, TrainState(step=8, samples=1234, ranks=1))
    RunFolder(run).checkpoints.latest.write_text(checkpoint.path.name)
    answers = [Prediction(str(i), "vqa", "Is there?", "yes", "closed", "yes" if i else "no") for i in range(4)]
    weights = describe_weights(checkpoint.export)["weights"]
    for name, found in (("val", weights), ("old", {**weights, "medalign.safetensors": "0"}), ("foreign", None)):
        scores = {**score(answers), "provenance": {"weights": found}} if found else score(answers)
        folder = RunFolder(run).evaluation(name)
        folder.path.mkdir(parents=True)
        folder.scores.write_text(json.dumps(scores))
    return run


def test_the_card_is_one_of_the_hub_and_has_the_scores_of_these_weights(run, tmp_path):
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert isinstance(card.data, ModelCardData)
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "image-text-to-text")
    assert card.data.license is None and "none found: read the base model's terms" in card.text
    results = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert results == {("val", "closed_accuracy"): 0.75}
    assert "| val | closed questions, accuracy | 0.750 |" in card.text and "| 4 |" in card.text
    assert "| old |" not in card.text and "| foreign |" not in card.text
    assert "1,234 samples were drawn in 8 steps" in card.text
    assert "| cohort | not known: the folder has moved |" in card.text
    assert "| teacher | a-teacher |" in card.text and "| train.lr |" in card.text and "| torch |" in card.text
    assert "W on the image tokens at the input of block 2" in card.text


def test_the_card_has_no_path(run, tmp_path, student_folder):
    card = str(build_card(collect_facts(export.find_export(run), False)))
    for folder in (run.parents[1], student_folder.parent):
        assert str(folder) not in card and folder.name not in card
    assert "another-teacher" in card


def test_folders_of_the_same_name_have_a_row_each(run, tmp_path):
    folders = [tmp_path / name / "train" for name in "ab"]
    sizes = [write_shards(records(films, 0, "train"), folder).written for films, folder in enumerate(folders, 1)]
    export_folder = export.find_export(shutil.copytree(run, tmp_path / "run"))
    file = export_folder.parent / "config.yaml"
    config = configuration.read(file)
    config.data.train = [str(folder) for folder in folders]
    file.write_text(configuration.dump(config))
    card = str(build_card(collect_facts(export_folder, False)))
    assert sizes[0] != sizes[1] and f"| train | {sizes[0]} |\n| train | {sizes[1]} |" in card


def test_the_license_is_that_of_the_base_model(run, tmp_path):
    fields = "license: other\nlicense_name: a-license\nlicense_link: LICENSE.md\n"
    (tmp_path / CARD).write_text(f"---\n{fields}language: en\n---\ntext\n")
    card = build_card(collect_facts(export.find_export(run), True, str(tmp_path)))
    again = ModelCard(str(card))
    assert (again.data.license, again.data.license_name, again.data.license_link) == (
        "other",
        "a-license",
        "LICENSE.md",
    )
    assert again.data.language is None and "| a-license |" in again.text and again.data.library_name == "transformers"


def test_an_export_of_an_export_keeps_its_card(run, tmp_path):
    assert main(["export", str(run), "--output", str(tmp_path / "first")]) == 0
    assert main(["export", str(tmp_path / "first"), "--output", str(tmp_path / "second")]) == 0
    assert (tmp_path / "first" / CARD).read_bytes() == (tmp_path / "second" / CARD).read_bytes()
    (tmp_path / "first" / CARD).unlink()
    assert main(["export", str(tmp_path / "first"), "--output", str(tmp_path / "third")]) == 0
    assert "Not recorded" in (tmp_path / "third" / CARD).read_text()
