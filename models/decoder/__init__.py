"""The decoder that all families of language models here are: arguments, model, plan, names in Hugging Face's files.

A family says what its blocks are made of and how its files name them; everything else stands here once. Families with
a model of their own are possible (`TrainSpec` asks for none of this), and were the rule until there were two of them.
"""
