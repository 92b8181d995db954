"""The servers of tests/server."""

from tests.server.conftest import decoder, model_path, run_server, served, tokenizer

__all__ = ["decoder", "model_path", "run_server", "served", "tokenizer"]
