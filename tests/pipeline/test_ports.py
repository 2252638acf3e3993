"""Ports given away for daemons that start later."""

from __future__ import annotations

import socket

from kvguard.pipeline import ports


def test_a_port_is_given_away_once_however_often_one_asks(monkeypatch):
    monkeypatch.setattr(ports, "PORTS", range(12_000, 12_064))
    monkeypatch.setattr(ports, "_given", set())
    given = [port for count in (1, 7, 16) for port in ports.free_ports(count)]
    assert len(set(given)) == len(given) == 24 and set(given) <= set(ports.PORTS)


def test_a_port_that_somebody_has_is_not_given_away(monkeypatch):
    (taken, other) = ports.free_ports(2)
    monkeypatch.setattr(ports, "PORTS", range(min(taken, other), max(taken, other) + 1, max(1, abs(other - taken))))
    monkeypatch.setattr(ports, "_given", set())
    with socket.create_server(("127.0.0.1", taken)):
        assert ports.free_ports(1) == [other]
