"""The AlignGPT model: configuration, alignment (level table and gate), vision, LLM parts, loss, packing."""
