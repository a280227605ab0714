"""The Mistral family: shapes, names in Hugging Face's files and training configs."""
