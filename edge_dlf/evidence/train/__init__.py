"""Training of experts: LoRA adapters over a GGUF base, for themselves or for the fusion with a large model."""
