"""An expert of one's own: a LoRA over a GGUF base, trained on prompts and their answers."""
