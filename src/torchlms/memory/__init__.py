"""The places: bytes and transfers, no policy."""
