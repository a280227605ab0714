"""The Qwen3 family, dense and mixture-of-experts: shapes, model, plan and training configs."""
