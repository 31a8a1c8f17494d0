"""The progress endpoint: pods post, the endpoint checks who they are and writes ``status.progress`` at a bounded rate."""
