"""The model's inputs: processor, chat templates, tokenizer and pixels."""
