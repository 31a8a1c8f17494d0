"""A real Kubernetes cluster for a machine that has none: built from Go modules, run in namespaces, gone without a trace."""
