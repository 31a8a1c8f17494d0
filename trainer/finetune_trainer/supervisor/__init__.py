"""The training container's first process: starts the process that trains, watches it, and starts it again where that can help."""
