"""Real images: sources, shards, the node-local store, and batches by index."""
