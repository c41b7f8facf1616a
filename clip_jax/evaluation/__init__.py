"""Zero-shot classification, retrieval and linear probes, from nothing but a model's embeddings."""
