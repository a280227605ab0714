"""Chats: from records of several shapes through a chat template to tokens, and to which of them a loss is taken at."""
