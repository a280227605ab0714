"""The Gemma 3 family, without its vision tower: shapes, names in Hugging Face's files and training configs."""
