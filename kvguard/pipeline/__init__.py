"""The reference engine: a real language model split by layers over stages, with a paged KV pool in shareable memory.

Knows: model directories, the forward pass, batches, sampling, text. Must not know: daemons, transports or recovery plans, except
through engine, emitter and transport. Importing the package imports nothing heavy: only model, attention and weights.read need torch.
"""
