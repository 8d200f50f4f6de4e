"""Which addresses mean this machine."""

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Tell whether an address means this machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def reaches_loopback_only(host: str) -> bool:
    """Tell whether who listens at this name or address hears this machine only."""
    try:
        return is_loopback(socket.gethostbyname(host))
    except OSError:
        return is_loopback(host)
