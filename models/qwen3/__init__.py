"""The Qwen3 family, dense and mixture-of-experts: shapes, names in Hugging Face's files and training configs."""
