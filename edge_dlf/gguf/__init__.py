"""Reads and judges GGUF headers, without llama.cpp."""
