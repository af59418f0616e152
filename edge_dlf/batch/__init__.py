"""Batches over files that survive kills, and over a Ray cluster."""
