"""The train stage: hold a GPU for as long as gradients flow or answers are generated, and prove what was saved."""

import os

# Read by libgomp when torch is first imported. By default its threads spin at every barrier, and where a container does not have
# its cores to itself they spin against the thread they wait for: with two busy cores, a forward pass of a 135M model did
# 129 tokens/s spinning and 706 sleeping, ten steps of generation took 8.5 s and 1.0 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
