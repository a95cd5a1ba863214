"""The residual dense block of ESRGAN."""
