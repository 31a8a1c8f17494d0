"""Experiment trackers: W&B, MLflow, TensorBoard and Trackio are told of a run, and never in its way.

Each one's library runs in a process of its own. It may take seconds to import, hang, exit or log to anywhere: it costs training no
lock, no random number and no second, sees no GPU, and is killed when it takes too long. What it has not been told of stays where it is
anyway, in the log of steps, so an outage of any length loses nothing that a later try or execution cannot make good.
"""
