"""The AlignGPT model: configuration, alignment (level table and gate), vision, heads, loss, packing."""
