"""Decodes token ids: members, KV caches, drafts, batches. Knows no text."""
