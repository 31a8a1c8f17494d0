"""Settings that must stand before any test module imports torch."""

import os

# See trainer/finetune_trainer/train/__init__.py; tests share their cores with servers and each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
