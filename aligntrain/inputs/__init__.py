"""What the model is fed: the processor, chat templates, tokenizer and pixels."""
