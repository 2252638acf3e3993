"""What an instance says outside of streams, as far as the gateway believes it."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from kvguard.gateway.events import Declined, Lost
from kvguard.gateway.upstream import Tokenized, Upstream


def tokenized(document: dict) -> Tokenized:
    async def asked() -> Tokenized:
        async with httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(200, json=document))) as client:
            return await Upstream(client, "http://instance.test", 5.0).tokenize({"prompt": "x"}, "r", {})

    return asyncio.run(asked())


def test_a_tokenized_prompt():
    assert tokenized({"tokens": [1, 2], "max_model_len": 64}) == Tokenized((1, 2), 64)
    assert tokenized({"tokens": [1, 2], "max_model_len": True}) == Tokenized((1, 2), 0)


def test_a_prompt_without_tokens_is_its_clients_fault():
    """It was taken for nonsense: a few empty prompts, and every instance was left alone for seconds."""
    with pytest.raises(Declined) as refused:
        tokenized({"tokens": [], "max_model_len": 64})
    assert refused.value.status == 400 and b"no tokens" in refused.value.body


@pytest.mark.parametrize("tokens", [None, "12", [1, -1], [1, True], [1, "2"], [1, 1 << 40], {"0": 1}])
def test_what_is_no_prompt_is_a_lost_answer(tokens):
    """An id beyond 32 bits raised in the decoder instead, and no other instance was asked."""
    with pytest.raises(Lost, match="without ids"):
        tokenized({"tokens": tokens, "max_model_len": 64})
