"""The CPU stage that may run while the training Job waits in its queue: the base model into the cache."""
