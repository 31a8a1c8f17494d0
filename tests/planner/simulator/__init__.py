"""A training step of the real model code in torch's FakeTensorMode: what a GPU would hold, without a GPU and without weights."""
