"""``finetune``: what a person or a CI pipeline types. Works on files alone; no cluster is needed."""
