"""The train stage: hold a GPU for as long as gradients flow or answers are generated, and prove what was saved."""
