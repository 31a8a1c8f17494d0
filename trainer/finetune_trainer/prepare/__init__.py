"""The CPU stage: check, tokenise, split and store the data; inspect the model without its weights."""
