"""The OpenAI-compatible proxy in front of the instances: it is their emitter, and goes on with a client's stream where an instance died.

For routers of others: `policy.decide` says what can be resumed, `continuation.Continuation` is one stream across instances, without I/O;
docs/resume-protocol.md is the same as an HTTP contract.
"""
