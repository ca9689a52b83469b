"""A model's text side: tokenizer, chat template, detokeniser, stop strings."""
