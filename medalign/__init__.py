"""MedAlign: distil a medical CLIP's sight into a medical vision-language model."""

__version__ = "0.1.0"
