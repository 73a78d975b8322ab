"""IU-Xray, the Indiana University chest X-rays (Demner-Fushman et al. 2016), as OpenI gives them out: XML and PNG.

The XML is read by defusedxml, which refuses entities and document types: a report is data, never instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException, ElementTree

from medalign.data.records import Record, Refused
from medalign.data.samples import BadSample
from medalign.data.sources.annotations import read_csv
from medalign.data.sources.files import first_folder, lacking, read_pictures
from medalign.data.sources.reports import SECTIONS, VIEWS, report_text
from medalign.data.sources.source import Chosen, Item, Setting, Source
from medalign.data.sources.splitting import share, share_split, warn_of_empty_splits
from medalign.data.sources.texts import text

REPORTS = "ecgen-radiology"
PROJECTIONS = "indiana_projections.csv"
_PICTURES = ("NLMCXR_png", "images")

LAYOUT = """\
ecgen-radiology/1.xml, ...                   the reports (NLMCXR_reports.tgz)
NLMCXR_png/CXR1_1_IM-0001-3001.png, ...      the images (NLMCXR_png.tgz); the folder may be named images/

indiana_projections.csv                      which images are frontal (uid, filename, projection); may be left out: it
                                             comes with the copy of the data set on Kaggle

Written is one sample a study with its first frontal image (--views study: with all its images, the frontal ones first;
--views all: one sample an image); without the table of projections the first image counts as frontal. OpenI publishes
no split, so a hash of the study's name parts train/ and test/. The usual published split is that of the R2Gen form:
medalign shards r2gen."""


def missing(folder: Path, _chosen: Chosen) -> list[str]:
    lines = lacking(folder, {REPORTS: "the reports, one XML file a study", "|".join(_PICTURES): "the images as PNG"})
    if not lines and not any((folder / REPORTS).glob("*.xml")):
        lines.append(f"{REPORTS}/*.xml: the reports, one XML file a study")
    return lines


def items(folder: Path, chosen: Chosen) -> Iterator[Item | Refused]:
    paths = sorted((folder / REPORTS).glob("*.xml"), key=lambda path: (len(path.stem), path.stem))
    frontal = _frontal(folder / PROJECTIONS)
    splits: dict[str, str] = {}  # of each study
    for path in paths:
        try:
            study = _parse(path)
        except BadSample as error:
            yield Refused(f"{REPORTS}/{path.name}", str(error))
            continue
        samples = _samples(study["case"], study.pop("pictures"), frontal, chosen["views"])
        if not samples:
            yield Refused(study["case"], "report names no image, or no frontal one")
        split = splits[study["case"]] = share_split(study["case"], chosen["test_share"])
        for number, image in enumerate(samples):
            yield Item(split, f"{study['case']}-{number}", {**study, "image": image})
    warn_of_empty_splits(splits, chosen["test_share"])


def _frontal(table: Path) -> set[tuple[str, str]] | None:
    """Study and picture (as in "CXR1", "IM-0001-4001") of the frontal images; None without the table."""
    if not table.exists():
        return None
    rows = read_csv(table, "uid", "filename", "projection")
    return {(f"CXR{row['uid']}", _number(row["filename"])) for row in rows if row["projection"] == "Frontal"}


def _samples(case: str, pictures: list[str], frontal: set[tuple[str, str]] | None, views: str) -> Sequence[Any]:
    """A study's samples: of each the picture, or for views "study" the list of pictures."""
    if views == "all":
        return pictures
    first = [name for name in pictures if frontal is None or (case, _number(name)) in frontal]
    if views == "frontal":
        return first[:1]
    return [first + [name for name in pictures if name not in first]] if pictures else []


def _number(name: str) -> str:
    """ "IM-0001-4001" of "CXR1_1_IM-0001-4001.png" and of "1_IM-0001-4001.dcm.png"."""
    return name.split("_")[-1].split(".")[0]


def _parse(path: Path) -> dict[str, Any]:
    """Name, sections, headings and pictures of a study."""
    try:
        root = ElementTree.fromstring(path.read_bytes(), forbid_dtd=True)
    except DefusedXmlException as error:
        raise BadSample(f"XML has a document type or entities, which are not read ({error})") from error
    except (OSError, ParseError, ValueError, LookupError) as error:  # an encoding that Python does not know, too
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


def record(folder: Path, item: Item, chosen: Chosen) -> Record:
    study = item.data
    fields = {
        "id": item.key,
        "task": "report",
        "question": "",
        "report": report_text(study["sections"], chosen["sections"]),
        **study["sections"],
        "labels": study["labels"],
        "split": item.split,
        "case": study["case"],
        "image": study["image"],
    }
    return Record(item.key, read_pictures(first_folder(folder, *_PICTURES), study["image"]), fields)


SOURCE = Source(
    "iu-xray",
    "IU-Xray: chest X-rays with reports, OpenI's XML and PNG",
    LAYOUT,
    missing,
    items,
    record,
    (
        SECTIONS,
        VIEWS,
        Setting("test-share", "share of the studies that go to test/", 0.2, parse=share),
    ),
    "Indiana University Chest X-rays (openi.nlm.nih.gov, NLMCXR_reports.tgz and NLMCXR_png.tgz)",
)
