"""Channel attention: scale every channel by a gate computed from its global average, then add a skip."""
