"""IU-Xray or MIMIC-CXR in the format of R2Gen (Chen et al. 2020): one annotation.json with the usual split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused
from medalign.datasets.annotations import Entry, parse_entries, read_json
from medalign.datasets.base import DatasetConverter, Item, Setting, Settings
from medalign.datasets.files import missing_paths, read_pictures
from medalign.datasets.report_text import report_fields
from medalign.datasets.texts import field
from medalign.errors import DataError

ANNOTATION = "annotation.json"

LAYOUT = """\
annotation.json   {"train": [{"id": "CXR2384_IM-0942", "report": "...",
                              "image_path": ["CXR2384_IM-0942/0.png", "CXR2384_IM-0942/1.png"]}, ...],
                   "val": [...], "test": [...]}
images/CXR2384_IM-0942/0.png, 1.png, ...

The output is train/, val/ and test/, with one sample per study and its first image, usually the frontal one (--views
study: with all its images, as IU-Xray in this format is used in the literature; --views all: one sample per image, each
with the report of the study). The reports are the findings as prepared by R2Gen."""

_SPLITS = ("train", "val", "test")


def _validate_layout(folder: Path, _settings: Settings) -> list[str]:
    return missing_paths(folder, {ANNOTATION: "reports and image paths by split", "images": "the images"})


def _iter_items(folder: Path, settings: Settings) -> Iterator[Item | Refused]:
    annotation = read_json(folder / ANNOTATION)
    if not isinstance(annotation, dict) or not any(name in annotation for name in _SPLITS):
        raise DataError(f"{folder / ANNOTATION} contains no object with the lists train, val and test")
    for split in _SPLITS:
        studies = annotation.get(split) or []
        if not isinstance(studies, list):
            raise DataError(f"{folder / ANNOTATION}: {split} is a JSON {type(studies).__name__}; it must be a list")
        entries = [Entry(f"{ANNOTATION} {split} entry {number}", study) for number, study in enumerate(studies)]
        for study in parse_entries(entries, _parse):
            if isinstance(study, Refused):
                yield study
                continue
            pictures = study.pop("pictures")
            samples = {"first": pictures[:1], "study": [pictures], "all": pictures}[settings["views"]]
            for view, image in enumerate(samples):
                yield Item(split, f"{study['case']}-{view}".replace(".", "_"), {**study, "image": image})


def _parse(study: dict[str, Any]) -> dict[str, Any]:
    """Name, report and images of a study. Raises BadSample."""
    case, pictures = field(study, "id"), study.get("image_path")
    pictures = [pictures] if isinstance(pictures, str) else pictures
    if not case or not pictures:
        raise BadSample("it is not a study with id and image_path")
    if not isinstance(pictures, list):
        raise BadSample(f"image_path is {pictures!r}; it must be a list of paths")
    return {"case": case, "report": study.get("report"), "pictures": pictures}


def _build_record(folder: Path, item: Item, _settings: Settings) -> Record:
    report = field(item.data, "report")
    if not report:
        raise BadSample("report is empty")
    fields = {**report_fields(item, report), "case": item.data["case"], "image": item.data["image"]}
    return Record(item.key, read_pictures(folder / "images", item.data["image"], folder), fields)


CONVERTER = DatasetConverter(
    "r2gen",
    "IU-Xray in the form of R2Gen: annotation.json and images",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    (
        Setting(
            "views",
            "the first image of a study, all its images in one sample, or one sample per image",
            "first",
            ("first", "study", "all"),
        ),
    ),
    "R2Gen (github.com/zhjohnchan/R2Gen names the archives iu_xray and mimic_cxr)",
)
