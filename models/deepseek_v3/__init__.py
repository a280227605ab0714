"""The DeepSeek family, V2 and V3, and what is shaped like it: shapes, names and training configs."""
