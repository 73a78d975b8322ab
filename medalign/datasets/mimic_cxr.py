"""MIMIC-CXR-JPG 2.x (Johnson et al. 2019, PhysioNet): chest X-rays as JPEG, with the reports of MIMIC-CXR."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused
from medalign.datasets.annotations import read_csv
from medalign.datasets.base import DatasetConverter, Item, Settings
from medalign.datasets.files import missing_paths, read_bytes, read_pictures
from medalign.datasets.report_text import SECTIONS, VIEWS, report_fields, report_text, split_sections
from medalign.datasets.text_files import decode_text

SPLIT = "mimic-cxr-2.0.0-split.csv"
METADATA = "mimic-cxr-2.0.0-metadata.csv"

LAYOUT = """\
files/p10/p10000032/s50414267/DICOM_ID.jpg             the images (MIMIC-CXR-JPG)
mimic-cxr-2.0.0-split.csv.gz (or .csv)                 the official split (MIMIC-CXR-JPG; 2.1.0 keeps the name)
mimic-cxr-2.0.0-metadata.csv.gz (or .csv)              the views (MIMIC-CXR-JPG)
mimic-cxr-reports/files/p10/p10000032/s50414267.txt    the reports (mimic-cxr-reports.zip of MIMIC-CXR;
                                                       files/p10/p10000032/s50414267.txt is also accepted)

The output is train/, val/ and test/ of the official split ("validate" becomes val), with one sample per study and its
frontal image, PA rather than AP; studies without one are skipped (--views study: with all its images, first PA, then
AP, then others; --views all: one sample per image, each with the report of the study). Findings and impression of a
report are recognized by their headings and kept separately in the metadata. Both data sets require a PhysioNet
credential, and their terms also apply to the shards."""

_REPORTS = ("mimic-cxr-reports/files", "mimic-cxr-reports", "files")
_IDENTITY = ("dicom_id", "study_id", "subject_id")
_FRONTAL = {"PA": 0, "AP": 1}
_NAMES = {"train": "train", "validate": "val", "test": "test"}


def _validate_layout(folder: Path, _settings: Settings) -> list[str]:
    wanted = {
        "files": "the images, files/p10/...",
        f"{SPLIT}.gz|{SPLIT}": "the official split",
        f"{METADATA}.gz|{METADATA}": "the views of the images",
    }
    lines = missing_paths(folder, wanted)
    if (folder / "files").is_dir() and not _has_reports(folder):
        lines.append("mimic-cxr-reports/files/p10/.../s*.txt: the reports; unpack mimic-cxr-reports.zip of MIMIC-CXR")
    return lines


def _iter_items(folder: Path, settings: Settings) -> Iterator[Item | Refused]:
    """Yield one item per study (or image), in the order of the table of splits."""
    views = {
        row["dicom_id"]: row["ViewPosition"] for row in read_csv(_table(folder, METADATA), "dicom_id", "ViewPosition")
    }
    studies: dict[tuple[str, str], list[dict[str, str]]] = {}
    table = _table(folder, SPLIT)
    for number, row in enumerate(read_csv(table, *_IDENTITY, "split"), start=1):
        absent = [name for name in _IDENTITY if not row[name]]
        if absent:
            yield Refused(f"{table.name} row {number}", f"{absent[0]} is empty")
            continue
        studies.setdefault((row["subject_id"], row["study_id"]), []).append(row)
    for (patient, study), rows in studies.items():
        name = f"p{patient}-s{study}"
        if rows[0]["split"] not in _NAMES:
            yield Refused(name, f"split is {rows[0]['split']!r}; it must be train, validate or test")
            continue
        samples = _samples({row["dicom_id"]: views.get(row["dicom_id"], "") for row in rows}, settings["views"])
        if not samples:
            yield Refused(name, "study has no frontal image")
        for image, view in samples:
            key = f"{name}-{image}" if settings["views"] == "all" else name
            data = {"patient": f"p{patient}", "study": f"s{study}", "image": image, "view": view}
            yield Item(_NAMES[rows[0]["split"]], key, data)


def _samples(pictures: dict[str, str], views: str) -> Sequence[tuple[Any, Any]]:
    """Image and view of each sample of a study with these images and views; lists of both for "study"."""
    if views == "all":
        return list(pictures.items())
    ordered = sorted(pictures.items(), key=lambda picture: (_FRONTAL.get(picture[1], 2), picture[0]))
    if views == "frontal":
        return [(image, view) for image, view in ordered if view in _FRONTAL][:1]
    return [([image for image, _ in ordered], [view for _, view in ordered])]


def _build_record(folder: Path, item: Item, settings: Settings) -> Record:
    patient, study = item.data["patient"], item.data["study"]
    place = f"{patient[:3]}/{patient}/{study}"
    sections = split_sections(_report(folder, place))
    fields = {
        **report_fields(item, report_text(sections, settings["sections"])),
        **sections,
        "case": study,
        **item.data,
    }
    image = item.data["image"]
    names = [f"{place}/{one}.jpg" for one in image] if isinstance(image, list) else f"{place}/{image}.jpg"
    return Record(item.key, read_pictures(folder / "files", names), fields)


def _table(folder: Path, name: str) -> Path:
    return next(folder / f"{name}{ending}" for ending in (".gz", "") if (folder / f"{name}{ending}").exists())


def _has_reports(folder: Path) -> bool:
    """Return whether there are reports. Only folders such as p10/ are searched, not all 65,000 patients."""
    groups = (group for name in _REPORTS for group in sorted((folder / name).glob("p1[0-9]")))
    return any(any(patient.glob("s*.txt")) for group in groups for patient in islice(group.iterdir(), 100))


def _report(folder: Path, place: str) -> str:
    names = [f"{name}/{place}.txt" for name in _REPORTS]
    name = next((name for name in names if (folder / name).exists()), names[0])
    data = read_bytes(folder, name, "report")
    try:
        return decode_text(data)
    except BadSample as error:
        raise BadSample(f"report {error}") from error


CONVERTER = DatasetConverter(
    "mimic-cxr-jpg",
    "MIMIC-CXR-JPG: chest X-rays with reports",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    (
        SECTIONS,
        VIEWS,
    ),
    "MIMIC-CXR-JPG and MIMIC-CXR (physionet.org)",
)
