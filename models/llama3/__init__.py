"""The Llama 3 family: shapes, model, plan and training configs."""
