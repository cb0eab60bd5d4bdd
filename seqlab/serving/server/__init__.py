"""The HTTP server: OpenAI's completions and chat over a `Batcher`."""
