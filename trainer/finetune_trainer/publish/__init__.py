"""The publish stage: check, merge, describe, and write the manifest last."""
