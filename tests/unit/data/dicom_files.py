"""DICOM files made for tests, with a patient's name that must not reach the image."""

from __future__ import annotations

import io

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage


def data_set(values: np.ndarray, syntax: UID = ExplicitVRLittleEndian, **tags: object) -> Dataset:
    """Gray [rows, columns] of 12 bits, or color [rows, columns, 3] of 8; `tags` are added."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = syntax
    one = Dataset()
    one.file_meta = meta
    one.SOPClassUID, one.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    one.PatientName, one.PatientID, one.StudyDate = "Doe^Jane", "secret-4711", "20200102"
    one.Rows, one.Columns = values.shape[:2]
    gray = values.ndim == 2
    one.SamplesPerPixel, one.PhotometricInterpretation = (1, "MONOCHROME2") if gray else (3, "RGB")
    if not gray:
        one.PlanarConfiguration = 0
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = (16, 12, 11, 0) if gray else (8, 8, 7, 0)
    one.PixelData = values.astype(np.uint16 if gray else np.uint8).tobytes()
    for name, value in tags.items():
        setattr(one, name, value)
    return one


def compressed(frames: list[bytes], values: np.ndarray, syntax: UID, **tags: object) -> Dataset:
    """A data set with encoded frames; `values` gives their shape."""
    one = data_set(values, syntax, **tags)
    one.PixelData = encapsulate(frames)
    one["PixelData"].is_undefined_length = True
    return one


def file_of(one: Dataset) -> bytes:
    buffer = io.BytesIO()
    one.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def study(values: np.ndarray, **tags: object) -> bytes:
    """The bytes of a file with these pixels."""
    return file_of(data_set(values, **tags))


def jpeg(rgb: np.ndarray, subsampling: int = 0, adobe: int | None = None, jfif: bool = True) -> bytes:
    """A JPEG of YCbCr, as Pillow writes it; `adobe` is the color transform in the Adobe marker."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=95, subsampling=subsampling)
    data = buffer.getvalue()
    marker = b"" if adobe is None else b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([adobe])
    rest = data[2:] if jfif else data[4 + int.from_bytes(data[4:6], "big") :]
    return data[:2] + marker + rest
