"""The appliers that turn a model and its plan into a parallel one."""
