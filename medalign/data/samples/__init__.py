"""From bytes to a validated sample: images, DICOM, text."""
