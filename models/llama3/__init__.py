"""The Llama 3 family: shapes, names in Hugging Face's files and training configs."""
