"""Bytes to a checked sample: pictures, DICOM, text."""
