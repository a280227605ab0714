"""The GPT-OSS family: shapes, names of tensors and training configs."""
