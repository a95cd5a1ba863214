"""The residual channel attention block: see `op.py`."""
