"""The stage of an AdapterCombination: several adapters in, one out, on a CPU and without their base."""
