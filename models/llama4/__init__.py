"""The Llama 4 family, as far as it reads text: shapes, names of tensors and training configs."""
