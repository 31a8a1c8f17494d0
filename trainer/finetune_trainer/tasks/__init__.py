"""Tasks of EleutherAI's lm-eval (``evaluation.tasks``): requests are made before training and scores computed after it, on a CPU, by lm-eval in
a process of its own; the training process answers them without it."""
