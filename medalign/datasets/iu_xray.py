"""IU-Xray, the Indiana University chest X-rays (Demner-Fushman et al. 2016), in OpenI's format: XML and PNG.

The XML is parsed with defusedxml, which rejects entities and document types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException, ElementTree

from medalign.data.samples.sample import BadSample
from medalign.data.shards.records import Record, Refused
from medalign.datasets.annotations import read_csv
from medalign.datasets.base import DatasetConverter, Item, Setting, Settings
from medalign.datasets.files import first_folder, missing_paths, read_pictures
from medalign.datasets.report_text import SECTIONS, VIEWS, report_fields, report_text
from medalign.datasets.splitting import parse_fraction, split_by_hash, warn_of_empty_splits
from medalign.datasets.texts import text

REPORTS = "ecgen-radiology"
PROJECTIONS = "indiana_projections.csv"
_PICTURES = ("NLMCXR_png", "images")

LAYOUT = """\
ecgen-radiology/1.xml, ...                   the reports (NLMCXR_reports.tgz)
NLMCXR_png/CXR1_1_IM-0001-3001.png, ...      the images (NLMCXR_png.tgz); the folder may also be named images/

indiana_projections.csv                      optional: which images are frontal (uid, filename, projection); part of the
                                             copy of the data set on Kaggle

The output has one sample per study with its first frontal image (--views study: with all its images, the frontal ones
first; --views all: one sample per image). Without the table of projections, the first image is used as the frontal one.
OpenI publishes no split, so train/ and test/ are assigned by a hash of the study's name. For the usual published split,
convert the data set in R2Gen's format: medalign shards r2gen."""


def _validate_layout(folder: Path, _settings: Settings) -> list[str]:
    lines = missing_paths(
        folder, {REPORTS: "the reports, one XML file per study", "|".join(_PICTURES): "the images as PNG"}
    )
    if not lines and not any((folder / REPORTS).glob("*.xml")):
        lines.append(f"{REPORTS}/*.xml: the reports, one XML file per study")
    return lines


def _iter_items(folder: Path, settings: Settings) -> Iterator[Item | Refused]:
    paths = sorted((folder / REPORTS).glob("*.xml"), key=lambda path: (len(path.stem), path.stem))
    frontal = _frontal(folder / PROJECTIONS)
    splits: dict[str, str] = {}  # of each study
    for path in paths:
        try:
            study = _parse(path)
        except BadSample as error:
            yield Refused(f"{REPORTS}/{path.name}", str(error))
            continue
        samples = _samples(study["case"], study.pop("pictures"), frontal, settings["views"])
        if not samples:
            yield Refused(study["case"], "report names no image, or no frontal one")
        split = splits[study["case"]] = split_by_hash(study["case"], settings["test_share"])
        for index, image in enumerate(samples):
            yield Item(split, f"{study['case']}-{index}", {**study, "image": image})
    warn_of_empty_splits(splits, settings["test_share"])


def _frontal(table: Path) -> set[tuple[str, str]] | None:
    """Study and image of the frontal images, for example ("CXR1", "IM-0001-4001"); None without the table."""
    if not table.exists():
        return None
    rows = read_csv(table, "uid", "filename", "projection")
    return {(f"CXR{row['uid']}", _image_id(row["filename"])) for row in rows if row["projection"] == "Frontal"}


def _samples(case: str, pictures: list[str], frontal: set[tuple[str, str]] | None, views: str) -> Sequence[Any]:
    """Image of each sample of a study, or a list with the list of its images for the views "study"."""
    if views == "all":
        return pictures
    first = [name for name in pictures if frontal is None or (case, _image_id(name)) in frontal]
    if views == "frontal":
        return first[:1]
    return [first + [name for name in pictures if name not in first]] if pictures else []


def _image_id(name: str) -> str:
    """Return "IM-0001-4001" for "CXR1_1_IM-0001-4001.png" and for "1_IM-0001-4001.dcm.png"."""
    return name.split("_")[-1].split(".")[0]


def _parse(path: Path) -> dict[str, Any]:
    """Name, sections, headings and images of a study."""
    try:
        root = ElementTree.fromstring(path.read_bytes(), forbid_dtd=True)
    except DefusedXmlException as error:
        raise BadSample(f"XML has a document type or entities, which are not allowed ({error})") from error
    except (OSError, ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise BadSample(f"XML cannot be read ({error})") from error
    uid = root.find(".//uId")
    sections = {part.get("Label", "").upper(): _content(part) for part in root.iter("AbstractText")}
    return {
        "case": (uid.get("id") if uid is not None else None) or f"CXR{path.stem}",
        "sections": {name.lower(): sections.get(name, "") for name in ("FINDINGS", "IMPRESSION", "INDICATION")},
        "labels": [_content(major) for major in root.findall(".//MeSH/major")],
        "pictures": [f"{image.get('id')}.png" for image in root.iter("parentImage") if image.get("id")],
    }


def _content(element: Element) -> str:
    return text("".join(element.itertext()))


def _build_record(folder: Path, item: Item, settings: Settings) -> Record:
    study = item.data
    fields = {
        **report_fields(item, report_text(study["sections"], settings["sections"])),
        **study["sections"],
        "labels": study["labels"],
        "case": study["case"],
        "image": study["image"],
    }
    return Record(item.key, read_pictures(first_folder(folder, *_PICTURES), study["image"]), fields)


CONVERTER = DatasetConverter(
    "iu-xray",
    "IU-Xray: chest X-rays with reports, OpenI's XML and PNG",
    LAYOUT,
    _validate_layout,
    _iter_items,
    _build_record,
    (
        SECTIONS,
        VIEWS,
        Setting("test-share", "fraction of the studies in test/", 0.2, parse=parse_fraction),
    ),
    "Indiana University Chest X-rays (openi.nlm.nih.gov, NLMCXR_reports.tgz and NLMCXR_png.tgz)",
)
