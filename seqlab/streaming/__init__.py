"""Streaming inference: `stream_generate`, its sampling, and the states of streams."""
