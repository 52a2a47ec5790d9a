"""Real images: shards, the store of a node, and batches by index."""
