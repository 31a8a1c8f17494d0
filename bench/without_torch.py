"""Imported before the prepare stage: its image has no torch, which transformers would import here."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
