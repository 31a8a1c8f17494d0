"""The publish stage: check, score, merge, describe, and write the manifest last."""
