"""Many streams in one batch: scheduling, continuous batching, shared prefixes, and a server."""
